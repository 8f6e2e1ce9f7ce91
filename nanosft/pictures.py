"""Pictures, where matplotlib is installed: the losses of a run, and what labels were taken for."""
import numpy as np

from nanosft.files import atomic_file
from nanosft.report import read_rows


def new_figure(**options):
    """An empty figure, or None where matplotlib is missing or broken."""
    try:
        from matplotlib.figure import Figure
    except Exception:
        return None
    return Figure(layout="constrained", **options)


def write(figure, path):
    """Writes a PNG; returns whether it worked. A disk that does not take it is no reason to end a run."""
    try:
        with atomic_file(path) as file:
            figure.savefig(file, format="png", dpi=120)
    except OSError as error:
        print(f"warning: no {path.name} ({error})")
        return False
    return True


def plot_losses(out_dir, best_by="loss"):
    """loss.png from log.csv: both losses and the best step; below, the learning rate and the right answers."""
    figure = new_figure(figsize=(9, 6))
    if not figure:
        return
    try:
        rows = read_rows(out_dir / "log.csv")
        names = ("step", "train_loss", "learning_rate", "tokens", "val_loss", "val_score")
        steps, losses, rates, tokens, val_losses, scores = (
            np.array([float(row.get(name) or "nan") for row in rows]) for name in names)
    except ValueError:  # somebody has edited the log
        return
    if not rows:
        return
    evaluated, scored = ~np.isnan(val_losses), ~np.isnan(scores)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
    # every step's loss, thin, and over it the mean of windows of a fiftieth of the run
    window = max(1, len(rows) // 50)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    axes.plot(steps, losses, color="tab:blue", linewidth=0.6, alpha=0.35)
    label = f"training, mean of {window} steps" if window > 1 else "training"
    axes.plot(steps[window - 1:], smooth, color="tab:blue", label=label)
    if evaluated.any():
        best = min(np.flatnonzero(evaluated), key=lambda i: (-scores[i] if best_by != "loss" else 0, val_losses[i]))
        axes.plot(steps[evaluated], val_losses[evaluated], "o-", color="tab:orange", label="validation")
        label = f"best: {val_losses[best]:.4f} at step {steps[best]:,.0f}"
        axes.plot(steps[best], val_losses[best], "*", color="tab:red", markersize=15, zorder=3, label=label)
    axes.set(ylabel="loss per supervised token", yscale="log", xlim=(0, None))
    axes.legend()
    below.plot(steps, rates, ":", color="tab:green")
    below.set(xlabel=f"step of {tokens.mean():,.0f} tokens", ylabel="learning rate (dotted)", ylim=(0, None))
    if scored.any():
        right = below.twinx()
        right.plot(steps[scored], scores[scored], "s--", color="tab:purple", markersize=4)
        right.set(ylabel="right answers (squares)", ylim=(0, 1.05))
        right.yaxis.set_major_formatter("{x:.0%}")
    write(figure, out_dir / "loss.png")


def plot_confusion(counts, labels, path):
    """A confusion matrix, {(truth, likeliest): int}: the counts, over their share of the row as colour."""
    figure, names = new_figure(figsize=2 * [4 + 0.4 * len(labels)]), [label[:24] for label in labels]
    if not figure:
        return
    matrix = np.array([[counts[truth, taken] for taken in labels] for truth in labels])
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        if count:
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=color)
    ticks = range(len(labels))
    axes.set_xticks(ticks, names, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(ticks, names, parse_math=False)
    axes.set(xlabel="likeliest label", ylabel="truth", title=f"{matrix.trace():,} of {matrix.sum():,} right")
    if write(figure, path):
        print(f"drew {path}")
