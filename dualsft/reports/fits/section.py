"""The part of the page about one fit, and the one about several beside each other."""

from collections.abc import Sequence

from dualsft.reports.blocks import Section
from dualsft.reports.fits.folder import Fit
from dualsft.reports.fits.losses import curves_beside, loss_curves
from dualsft.reports.fits.results import final_table, fits_beside, forgotten
from dualsft.reports.fits.samples import lost_answers, samples
from dualsft.reports.fits.story import story


def fit_section(fit: Fit, name: str) -> Section:
    """All about one fit; its figures' files begin with a name."""
    return Section(
        f"Fit: {fit.name}",
        [story(fit), *final_table(fit)],
        [
            Section("Losses", loss_curves(fit, name)),
            Section("Samples before and after", samples(fit)),
            Section("What the model forgot", [*forgotten(fit), *lost_answers(fit)]),
        ],
    )


def fits_section(fits: Sequence[Fit]) -> Section:
    """Several fits beside each other."""
    return Section("Fits beside each other", [fits_beside(fits), *curves_beside(fits)])
