"""The pages for readers: commands and options parse, paths and names exist, links lead somewhere."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import yaml

import dualsft
from dualsft import InstructionDataModule, UserError
from dualsft.cli import run
from tests.plans.cases import write_config
from tests.reports.cases import write_evaluation, write_fit
from tests.world.jobs import write_inputs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md")])
GUIDES = ("write_a_scorer.md", "write_a_path.md", "write_an_allocator.md")  # test_guides.py runs these as they stand
VERBS = ("select", "fit", "validate")
PARSED = (*VERBS, "audit")
OPTIONS = ROOT / "docs" / "reference" / "options.md"


def text(page: Path) -> str:
    """The page as it is."""
    return page.read_text(encoding="utf-8")


def command_lines(page: Path) -> Iterator[str]:
    """The shell commands of a page: the lines of its blocks in bash, without their comments.

    A script that starts dualsft on several nodes takes its arguments, and is seen as dualsft itself.
    """
    for block in re.findall(r"^```bash\n(.*?)^```$", text(page), re.DOTALL | re.MULTILINE):
        for line in block.strip().splitlines():
            yield re.sub(r"^.*configs/\w+\.(sh|sbatch) ", "dualsft ", line.partition("   #")[0])


def dualsft_commands() -> list[str]:
    """All that the pages tell a reader to type: in blocks, and in lines of text where an option has a value."""
    found = [line for page in PAGES if page.name not in GUIDES for line in command_lines(page)]
    for page in PAGES:
        found += re.findall(r"`(dualsft [a-z]\w* [^`]*--[\w.]+ [^`]+)`", text(page))
    return sorted({c for c in found if c.startswith("dualsft ")})


COMMANDS = dualsft_commands()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[1] in PARSED], ids=str)
def test_commands_parse(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command for select, fit, validate and audit has options and values that these verbs know."""
    monkeypatch.chdir(ROOT)
    asks_for_help = ".help" in command
    arguments = shlex.split(command)[1:]
    with pytest.raises(SystemExit) as stop:
        run(arguments if asks_for_help else [*arguments, "--print_config"])
    assert not stop.value.code
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("dualsft export ")])
def test_export_commands_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command for export has all options that its form takes: what is missing is only the reader's files."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"BASE|TUNED|DELTA|delta\.safetensors"):
        run(shlex.split(command)[1:])


def test_allocate_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command for allocate runs on a finished selection."""
    commands = [c for c in COMMANDS if c.startswith("dualsft allocate ")]
    assert commands
    inputs = write_inputs(tmp_path)
    sources = ["--data.train", inputs.train, "--data.validation", inputs.validation, "--data.max_length", "48"]
    settings = ["--model.preconditioner", "none", "--model.warmup.fraction", "0"]
    monkeypatch.chdir(tmp_path)
    run(["select", "--model.model_name_or_path", inputs.model, *sources, *settings, "--output_dir", "SELECTION"])
    for k, command in enumerate(commands):
        _, verb, _, *options = shlex.split(command)
        run([verb, "SELECTION", *options, "--output_dir", str(k)])
        assert (tmp_path / str(k) / "manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("dualsft report ") and "DIR" not in c])
def test_report_commands_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command for report takes the directories that it names, of which a pattern may match several."""
    monkeypatch.chdir(tmp_path)
    given = shlex.split(command)[1:]
    folders = given[1 : given.index("--output_dir")]
    for pattern in folders:
        for name in ("a", "b") if "*" in pattern else ("",):
            write = write_evaluation if "eval-" in pattern else write_fit
            write(tmp_path / pattern.replace("*", name))
    found = [str(path.relative_to(tmp_path)) for pattern in folders for path in sorted(tmp_path.glob(pattern))]
    assert len(found) > len(folders) or "*" not in command
    run(["report", *found, *given[given.index("--output_dir") :]])
    assert (tmp_path / given[-1] / "report.html").is_file()


TINY = "TINY"
PLANS = {
    re.sub(r"configs/shapes/\S+", TINY, c.replace(" --probe", "")) for c in COMMANDS if c.startswith("dualsft plan ")
}
"""The commands for plan, each of the same tiny model, and without the probe, which has a test of its own."""
FULL_PLANS = sorted(c for c in PLANS if not any(set(c.split()) < set(other.split()) for other in PLANS))


@pytest.mark.slow
@pytest.mark.parametrize("command", FULL_PLANS)
def test_plan_commands_run(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command for plan prints a plan, here of a tiny model in the place of the page's, and with short batches.

    Those with nothing but a part of another's options are left out.
    """
    monkeypatch.chdir(ROOT)
    write_config(tmp_path, num_hidden_layers=1)
    given = [part.replace(TINY, str(tmp_path)) for part in shlex.split(command)[1:]]
    run([*given, "--data.max_length", "16", "--data.batch_tokens", "32"])
    assert "Highest peak: " in capsys.readouterr().out


def test_every_command_is_one_that_is_tested() -> None:
    """The commands of the pages are verbs that are tested here or by the quick start, and the scripts are there."""
    known = {*PARSED, "compare", "export", "allocate", "quickstart", "plugins", "report", "plan"}
    assert {c.split()[1] for c in COMMANDS} <= known
    for page in PAGES:
        for line in command_lines(page):
            for path in re.findall(r"configs/[\w./-]+", line):
                assert (ROOT / path).exists(), f"{page.name}: {path}"
            for script in re.findall(r"python (\S+\.py)", line):
                assert (ROOT / script).is_file() or page.name in GUIDES, f"{page.name}: {script}"


def spans_of_options() -> list[str]:
    """What the page of options has a reader write, in the last column of its tables."""
    rows = [line for line in text(OPTIONS).splitlines() if line.startswith("| ") and line.count(" | ") >= 2]
    return [span for row in rows for span in re.findall(r"`([^`]+)`", row.split(" | ", 2)[2])]


def merged(options: list[str]) -> dict[str, Any]:
    """One configuration from several options in the page's notation, the last one of a key counting."""
    config: dict[str, Any] = {}
    for option in options:
        ((path, value),) = yaml.safe_load(option).items()
        *sections, key = path.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = {**place[key], **value} if isinstance(value, dict) and key in place else value
    return config


@pytest.mark.parametrize("verb", VERBS)
def test_options_parse(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the page of options has a reader write is taken, key and value, by the verb that it is for."""
    spans = spans_of_options()
    written = [span for span in spans if re.match(r"(model|data|trainer)[\w.]*: ", span)]
    assert len(written) > 25
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(merged(written)), encoding="utf-8")
    added = [part for span in spans if span.startswith("--") and verb == "fit" for part in shlex.split(span)]
    added = [part for part in added if part != "--model.selection"]  # named as what to leave out
    with pytest.raises(SystemExit) as stop:
        run([verb, "--config", str(tmp_path / "options.yaml"), *added, "--print_config"])
    assert not stop.value.code
    assert yaml.safe_load(capsys.readouterr().out)["data"]["validation"] == {"gsm8k": "a.jsonl", "code": "b.jsonl"}


def test_configurations_of_data_are_taken() -> None:
    """Each configuration on the page of data is one that the data module takes, every key of it."""
    blocks = re.findall(
        r"^```yaml\n(.*?)^```$", text(ROOT / "docs" / "reference" / "data.md"), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) > 1
    for block in blocks:
        InstructionDataModule(**yaml.safe_load(block)["data"])


def test_configurations_of_recipes_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each configuration on the page of recipes is one that select takes, every key of it."""
    blocks = re.findall(r"^```yaml\n(.*?)^```$", text(ROOT / "docs" / "recipes.md"), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
        with pytest.raises(SystemExit) as stop:
            run(["select", "--config", str(tmp_path / "recipe.yaml"), "--print_config"])
        assert not stop.value.code
        capsys.readouterr()


def test_errors_are_in_the_code() -> None:
    """Every error on the page of errors is one that some module raises: what stands between the dots is in its code."""
    code = "".join(text(path) for path in sorted((ROOT / "dualsft").rglob("*.py")))
    joined = re.sub(r'"\s*f?"', "", code)  # sentences over several lines
    rows = re.findall(r"^\| `([^`]+)` \| ", text(ROOT / "docs" / "errors.md"), re.MULTILINE)
    assert len(rows) > 20
    for row in rows:
        for fragment in re.split(r"\s*…\s*", row):
            assert fragment in joined, row


def keys_of(config: dict[str, Any], prefix: str = "") -> set[str]:
    """The keys of a nested configuration, with dots."""
    keys: set[str] = set()
    for key, value in config.items():
        keys |= {f"{prefix}{key}"} | (keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) else set())
    return keys


def test_pages_name_keys_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Every configuration key that a page mentions is one of some verb's."""
    known: set[str] = set()
    for verb in VERBS:
        with pytest.raises(SystemExit):
            run([verb, "--print_config"])
        known |= keys_of(yaml.safe_load(capsys.readouterr().out))
    for page in PAGES:
        for key in re.findall(r"`((?:model|data|trainer)(?:\.\w+)+)(?:: [^`]*)?`", text(page)):
            assert key in known or page.name in GUIDES, f"{page.name}: {key}"


def tree_paths(page: Path) -> list[str]:
    """The paths in a page's indented tree."""
    return re.findall(r"^    ((?:dualsft|benchmarks|dev|plugins|tests)/\S*)", text(page), re.MULTILINE)


def test_the_tree_names_what_exists() -> None:
    """Every path of the tree is there, and every folder of the package is in it."""
    folders = {f"dualsft/{init.parent.name}/" for init in ROOT.glob("dualsft/*/__init__.py")}
    paths = tree_paths(ROOT / "docs" / "architecture.md")
    assert folders <= set(paths)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def names_in(page: Path) -> Iterator[str]:
    """The paths in the package and its dotted names that a page mentions."""
    for span in re.findall(r"`([^`\s]+)`", text(page)):
        if re.fullmatch(r"dualsft[/.][\w./]*\w/?", span):
            yield span


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_paths_and_names_exist(page: Path) -> None:
    """Every path in the package, and every dotted name of it, that a page mentions is there."""
    groups = ("dualsft.scorers", "dualsft.paths", "dualsft.parameter_allocators", "dualsft.data_allocators")
    for name in names_in(page):
        if "/" in name:
            assert (ROOT / name).exists(), f"{page.name}: {name}"
        elif name not in groups:
            resolve_name(name)


def test_public_names_are_listed() -> None:
    """The page of artifacts lists all that the package exports, and nothing else."""
    (listed,) = re.findall(r"`from dualsft import ([^`]+)`", text(ROOT / "docs" / "reference" / "artifacts.md"))
    assert set(re.split(r",\s+", listed)) == set(dualsft.__all__)


def test_glossary_says_where() -> None:
    """Each row of the glossary has a meaning and at least one place in the code, and no symbol or term has two rows."""
    page = ROOT / "docs" / "glossary.md"
    rows = [line.strip("| ").split(" | ") for line in text(page).splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0] not in ("symbol", "term", "---")]
    assert len(rows) > 50
    for row in rows:
        assert len(row) == 3, row
        assert re.search(r"`dualsft[/.]", row[2]), row
    assert len({row[0] for row in rows}) == len(rows)


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings can be linked by."""
    headings = re.findall(r"^#+ (.+)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link is to a file or a folder that exists, and to a heading of it if it names one."""
    for link in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if "://" in link:
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if fragment:
            assert fragment in anchors(target), f"{page.name}: {link}"


def test_every_page_can_be_reached() -> None:
    """From the README one comes to every page in two steps."""
    seen = {ROOT / "README.md"}
    for _ in range(2):
        for page in list(seen):
            links = re.findall(r"\]\(([^)\s#]+)", text(page))
            seen |= {target for link in links if (target := (page.parent / link).resolve()).suffix == ".md"}
    assert {page for page in PAGES if page.parent.name != "template"} <= seen
