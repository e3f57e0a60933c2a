"""The table that a run ends with."""

from mlfsic_jax.core.metrics import METRICS


def results_table(results: list[dict]) -> str:
    """``results.json`` as the table that a run ends with: percent, 95 % intervals over episodes."""
    columns = (("Ma-AP", "macro_ap"), ("Mi-AP", "micro_ap"), ("Ma-F1", "macro_f1"), ("Mi-F1", "micro_f1"))

    def row(name, values, metrics=METRICS):
        cells = [f"{100 * values[m]['mean']:6.1f} ± {100 * values[m]['ci95']:3.1f}" for _, m in columns if m in metrics]
        return f"  {name:<{width}}" + "  ".join(cells)

    width = max(len(name) + 4 for result in results for name in (*result["methods"], *result["paired"]))
    lines = []
    for result in results:
        lines.append("")
        lines.append(
            f"{result['dataset']}, {result['n_shot']}-shot: {result['episodes']} episodes of novel labels, "
            "%, mean ± 95 % interval over episodes"
        )
        lines.append(f"  {'method':<{width}}" + "  ".join(f"{title:>12}" for title, _ in columns) + "   ECE")
        lines.append(row("chance", result["chance"], ("macro_ap", "micro_ap")))
        for name, values in result["methods"].items():
            lines.append(row(name, values) + f"  {100 * result['calibration_error'][name]:4.1f}")
        lines.append("  paired differences, method - method on the same episodes")
        lines += [row(pair.replace("-", " - "), values) for pair, values in result["paired"].items()]
        lines += [f"  {name}: theta {value}, chosen on validation labels" for name, value in result["tuned"].items()]
    calibrated = [name for name in results[0]["methods"] if name in results[0]["validation"]["calibration"]]
    lines.append("  F1 at probability 0.5, ECE: calibration error; F1 is tuned for calibrated methods only.")
    if calibrated:
        lines.append(f"  Calibrated on support and validation labels: {', '.join(calibrated)}.")
    return "\n".join(lines)
