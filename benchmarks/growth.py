"""Cost of the loss against the number of mixed scales: the rows of ``loss``, and a picture of them."""

from loss import measure
from matplotlib.figure import Figure
from results import Record, as_table

__all__ = ["REPEATS", "draw", "measure"]

REPEATS = 5


def draw(record: Record) -> Figure:
    """Time of a forward and a backward pass against the number of maps, a curve for each loss."""
    rows = as_table(record)
    lomix_maps = rows.groupby("case")["maps"].transform("max")  # nnU-Net's loss has as many maps in each case
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for backend, of_backend in rows.groupby("backend", sort=False):
        ax.plot(lomix_maps[of_backend.index], of_backend["full_ms.median"], marker="o", label=backend)
    shape = rows["case"][0].rpartition(",")[0]
    ax.set(xlabel="maps of LoMix", ylabel="forward and backward, ms", xscale="log", yscale="log", title=shape)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return figure
