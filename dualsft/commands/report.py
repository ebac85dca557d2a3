"""`dualsft report`: one page about selections, fits, evaluations, audits and comparisons, and its figures."""

from collections.abc import Sequence
from pkgutil import resolve_name

import yaml
from jsonargparse import ActionYesNo, ArgumentParser

from dualsft.commands.parsing import add_folder_options, check_output_dir
from dualsft.experiments.report_folder import ReportFolder
from dualsft.reports.words import memory

DESCRIPTION = (
    "Writes one HTML page that shows what was chosen, trained and measured, and why: for the directories that select, "
    "fit, validate, audit and compare have written, one or several beside each other. The page needs no network; its "
    "figures are files too, as PNG and SVG."
)

_TOKEN_SCORES = (
    "Compute scores by token for the examples that are shown, where a selection kept none: loads its model, and "
    "repeats its warm-up and the gradient of its validation set."
)


def report_command(arguments: Sequence[str]) -> None:
    """Write the report, and print where it is."""
    parser = ArgumentParser(prog="dualsft report", description=DESCRIPTION, exit_on_error=False)
    parser.add_argument("directories", metavar="DIR", nargs="+", type=str, help="Directories of results.")
    add_folder_options(parser, resumable=False)
    parser.add_argument("--token_scores", action=ActionYesNo, default=False, help=_TOKEN_SCORES)
    options = parser.parse_args(list(arguments))
    check_output_dir(options)
    from dualsft.reports.report import FIGURES, PAGE, make_report  # imports torch, which help does without

    output = ReportFolder(options.output_dir, options.overwrite, (PAGE, FIGURES))
    compute = resolve_name("dualsft.commands.token_scores:computed_tokens") if options.token_scores else None  # heavy
    report = make_report(options.directories, compute)
    output.claim(yaml.safe_dump({"directories": options.directories, "token_scores": options.token_scores}))
    page = report.write(output.path)
    print(f"wrote {page} ({memory(page.stat().st_size)}) and {FIGURES}/ beside it; open the page in a browser")
