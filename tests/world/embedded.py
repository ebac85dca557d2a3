"""The embedded model and data, where pages expect them: in a folder that looks like the repository's root."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
ASSETS = Path("dualsft", "quickstart", "assets")
MEASURED = ("validation", "test_target", "test_general")


def embed(folder: Path, every: int) -> None:
    """Link the model and the pool into a folder, and write every so many rows of what losses are measured on."""
    (folder / ASSETS / "data").mkdir(parents=True)
    for name in ("model", "data/pool.jsonl"):
        (folder / ASSETS / name).symlink_to(ROOT / ASSETS / name)
    for name in MEASURED:
        path = ASSETS / "data" / f"{name}.jsonl"
        rows = (ROOT / path).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / path).write_text("".join(rows[::every]), encoding="utf-8")
