"""The sections of `benchmarks/gpu.py`, the cheapest and most decisive ones first."""

from gpu_checks.section import Section

SECTIONS = {
    "machine": Section("What the machine is, and how fast it multiplies and copies.", 30, "gpu_checks.machine:machine"),
    "correctness": Section(
        "Rows and columns of a scoring pass beside plain autograd, on the device.", 40, "gpu_checks.scores:correctness"
    ),
    "attention": Section(
        "Padded and packed batches beside batches without a mask, and their kernels.",
        40,
        "gpu_checks.profiling:attention",
    ),
    "scoring": Section("Scoring passes beside plain passes: time and MFU.", 70, "gpu_checks.speed:scoring"),
    "steps": Section("Masked steps of fine-tuning beside dense ones and LoRA.", 60, "gpu_checks.training:steps"),
    "precision": Section(
        "Scores in bfloat16 beside float32, from the same weights.", 40, "gpu_checks.scores:precision"
    ),
    "launches": Section(
        "Launches, waits and reads of a batch on 28 layers, beside a plain pass.", 40, "gpu_checks.profiling:launches"
    ),
    "experts": Section(
        "A mixture of experts: its scores beside autograd, its time, launches and reads beside a plain pass.",
        60,
        "gpu_checks.mixtures:experts",
    ),
    "peaks": Section("Peaks of memory beside those that `dualsft plan` predicts.", 90, "gpu_checks.peaks:peaks"),
    "strategies": Section(
        "`select` on one rank under torchrun: with sharded weights, and as a replica.",
        90,
        "gpu_checks.commands:one_rank",
        miniature=False,
    ),
    "commands": Section(
        "`select` and `fit` on the embedded model, beside the CPU.", 60, "gpu_checks.commands:commands", miniature=False
    ),
    "warm-up": Section(
        "Steps on all weights, with their state on the device and on the host.", 60, "gpu_checks.warming:warm_up"
    ),
    "sums": Section(
        "Scoring passes with their sums of gradients on the device and on the host.", 60, "gpu_checks.summing:summing"
    ),
    "step parts": Section("Where the time of a masked step goes.", 40, "gpu_checks.training:step_parts"),
    "phases": Section("A batch of each phase of a selection, beside a plain pass.", 40, "gpu_checks.speed:phases"),
    "kernels": Section("Where the device's time goes in a scoring pass.", 30, "gpu_checks.profiling:kernels"),
    "compile": Section(
        "A masked step with compiled layers beside one without.", 90, "gpu_checks.speed:compiled", miniature=False
    ),
    "choosing": Section(
        "Choosing a tenth of the weights by their scores, on the host.", 60, "gpu_checks.choosing:choosing"
    ),
}
