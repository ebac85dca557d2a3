"""A selection in a few lines, for the terminal."""

from dualsft.selection.artifact import Selection


def summary(selection: Selection) -> str:
    """What was scored and chosen, what was left out and why, what it cost, and where it lies."""
    m = selection.manifest
    examples, parameters = m["counts"]["examples"], m["counts"]["parameters"]
    left_out = {k: v for k, v in m["data"]["train"]["status"].items() if k != "ok" and v}
    nonfinite = selection.examples["status"].to_pylist().count("nonfinite")
    if nonfinite:
        left_out["nonfinite"] = nonfinite
    identity = m["sum_identity"]
    lines = [
        f"examples    {examples['selected']:,} of {examples['rows']:,} selected ({examples['scored']:,} scored"
        + "".join(f", {count:,} {status}" for status, count in left_out.items())
        + ")",
        f"weights     {parameters['selected']:,} of {parameters['scored']:,} selected "
        f"({parameters['selected'] / parameters['scored']:.1%}; {m['coverage']:.0%} covered by the scores)",
        f"sums        rows {identity['row_sum']:.6g}, columns {identity['column_sum']:.6g} "
        f"(difference {identity['relative_difference']:.1e} of the scores' size)",
    ]
    for phase in m["phases"]:
        rate = phase["tokens"] / phase["seconds"] if phase["seconds"] else 0.0
        lines.append(
            f"{phase['name']:<21} {phase['examples']:>8,} examples {phase['seconds']:>8.1f} s {rate:>10,.0f} "
            f"supervised tokens/s {phase['peak_memory_bytes'] / 2**20:>8,.0f} MiB peak"
        )
    lines.append(f"wrote       {selection.folder}")
    return "\n".join(lines)
