"""`dualsft audit`: how far a selection's scores can be trusted, by training variants of it."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from dualsft.commands.audit_jobs import AuditJobs
from dualsft.commands.fit import add_training_arguments
from dualsft.commands.lightning_cli import VerbCLI, tell
from dualsft.commands.parsing import add_experiment_options
from dualsft.errors import UserError
from dualsft.experiments.audit_figures import draw_audit
from dualsft.experiments.audit_plan import AuditOptions
from dualsft.experiments.bank import Bank
from dualsft.experiments.judgement import AuditRun, as_rows, judge
from dualsft.experiments.report_folder import ReportFolder
from dualsft.experiments.schedule import complete, plan, workers_for
from dualsft.finetune import MaskedFinetuneModule
from dualsft.runs.bars import numbered
from dualsft.selection import Selection
from dualsft.storage.writing import replacing, write_atomically, writing_to

_WRITTEN = ("bank", "audit.json", "runs.parquet", "figures")
_ABOUT_THE_AUDIT = ("audit", "bank", "parallel", "dry_run", "output_dir", "overwrite")


class AuditCLI(VerbCLI):
    """Train variants of a selection, and compare the gains that its scores predict for them with those they have."""

    verb = "audit"
    module_class = MaskedFinetuneModule
    resumable = False
    is_one_run = False

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of fit, which say how variants are trained, and those of the audit."""
        super().add_arguments_to_parser(parser)
        add_training_arguments(parser)
        add_experiment_options(parser)
        parser.add_class_arguments(AuditOptions, "audit")

    def run(self) -> None:
        """Audit, or say what would be done, and print the verdicts."""
        try:
            self._audit()
        except KeyboardInterrupt as stop:
            raise UserError("The audit was interrupted; the same command goes on from what is finished.") from stop

    def _audit(self) -> None:
        if self.model.selection is None:
            raise UserError("model.selection is not given; name the selection directory to audit.")
        options: AuditOptions = self.config_init.audit
        with TemporaryDirectory() as folder:
            jobs = AuditJobs(self._fit_config(Path(folder)), self.model, self.datamodule, self.trainer, options)
        output = ReportFolder(self.config.output_dir, self.config.overwrite, _WRITTEN)
        bank = Bank(self.config.bank or output.path / "bank")
        bank.check()
        fits = list(jobs.fits.values())
        with workers_for(self.config.parallel) as workers:
            if self.config.dry_run:
                tell(plan(bank, [*jobs.first, *fits], len(workers)))
                return
            output.claim(self.replay)
            complete(bank, jobs.first, workers, numbered("scores", 1, 2))
            jobs.check(bank)
            complete(bank, fits, workers, numbered("fits", 2, 2))
        _write(output.path, self.model.selection, jobs.runs(bank), jobs.calibrated, jobs.failures(bank))

    def _fit_config(self, folder: Path) -> Path:
        """Write the settings of the fits as a configuration of their own."""
        settings = yaml.safe_load(self.replay)
        path = folder / "fit.yaml"
        path.write_text(
            yaml.safe_dump({k: v for k, v in settings.items() if k not in _ABOUT_THE_AUDIT}), encoding="utf-8"
        )
        return path


def _write(
    folder: Path, selection: Selection, runs: list[AuditRun], calibrated: bool, failures: list[dict[str, str]]
) -> None:
    """Write the reports, and print the verdicts."""
    found = judge(runs, calibrated)
    about: dict[str, Any] = {"schema_version": 1, "selection": str(selection.folder), "calibrated": calibrated}
    with writing_to(folder), replacing(folder / "runs.parquet") as partial:
        pq.write_table(pa.Table.from_pylist(as_rows(runs)), partial)
    write_atomically(folder / "audit.json", json.dumps({**about, **found, "failures": failures}, indent=2))
    draw_audit(runs, calibrated, folder / "figures")
    for side, scorers in found.items():
        for scorer, figures in scorers.items():
            tell(f"{side:<11} {scorer}: {figures['verdict']}")
    if failures:
        tell(f"{len(failures)} runs failed and are left out: {failures[0]['name']}: {failures[0]['error']}")
    tell(f"wrote       {folder}: audit.json, runs.parquet, figures/")
