"""The paper's claims, each with what the CSV of an experiment says of it, and a verdict.

The verdicts are computed, by the rules that are written here, so that another run gives its own.
"""

from __future__ import annotations

import csv
from statistics import mean
from typing import TYPE_CHECKING, NamedTuple

from . import intervals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    Row = dict[str, str]
    Rows = list[Row]

SHOWN, IN_PART, CONTRARY, NOT_TESTED = "shown", "in part", "contrary", "not tested"
PAR = 0.01  # errors that differ by less are on a par: a point
POINTS = 100  # of a difference of 1


class Claim(NamedTuple):
    """What the paper says, where, and the table that speaks of it.

    Attributes:
        judge: of the table's rows, what was measured and the verdict.
    """

    text: str
    where: str
    table: str
    judge: Callable[[Rows], tuple[str, str]]


def together(verdicts: Iterable[str]) -> str:
    """Of several networks, say: shown everywhere, somewhere, or nowhere."""
    each = set(verdicts)
    return each.pop() if len(each) == 1 else IN_PART


def all_or_part(flags: Iterable[bool]) -> str:
    """Of things that hold or not."""
    return together(SHOWN if flag else CONTRARY for flag in flags)


def above_zero(row: Row) -> str:
    """Whether an interval is; one around 0 shows a part, namely nothing."""
    if float(row["low"]) > 0:
        return SHOWN
    return CONTRARY if float(row["high"]) < 0 else IN_PART


def on_a_par(row: Row) -> str:
    """Whether an interval is within a point of 0, or its middle is."""
    if float(row["low"]) >= -PAR and float(row["high"]) <= PAR:
        return SHOWN
    return IN_PART if abs(float(row["mean"])) <= PAR or above_zero(row) == IN_PART else CONTRARY


def interval(row: Row, unit: float = 1 / POINTS) -> str:
    """A mean with its 95 % interval."""
    numbers = (float(row[name]) / unit for name in ("mean", "low", "high"))
    return "{:+.1f} ({:+.1f} .. {:+.1f})".format(*numbers)


def by(key: str, rows: Iterable[Row], unit: float = 1 / POINTS) -> str:
    """The intervals of all rows."""
    return "; ".join(f"{row[key]} {interval(row, unit)}" for row in rows)


def corollary_1(rows: Rows) -> tuple[str, str]:
    """Powers of two keep all bits, other condition numbers stay within rounding."""
    exact = [r["same_bits"] == "True" for r in rows if float(r["condition_number"]) == 2**17]
    other = max(float(r["largest_difference"]) for r in rows if r["dtype"] == "float32")
    told = f"the same bits in {sum(exact)} of {len(exact)} runs at 2^17; "
    told += f"within {other:.1e} at 1e5 in float32"
    return told, all_or_part([*exact, other < 1e-6])


def par_with_bn(rows: Rows) -> tuple[str, str]:
    """Differences of test errors with BN."""
    told = f"Adam-l2's error minus AdamW's, points: {by('network', rows)}"
    return told, together(map(on_a_par, rows))


def no_decay_with_bn(rows: Rows) -> tuple[str, str]:
    """Best settings with BN."""
    best = [(f"{r['network']} {r['optimizer']}: {float(r['lambda']):g}", r) for r in rows]
    flags = [float(r["lambda"]) == 0 for _, r in best]
    return "best lambda: " + "; ".join(text for text, _ in best), all_or_part(flags)


def of_the_pair(rows: Rows, column: str, unit: float = 1.0) -> tuple[str, str]:
    """Whether a number of AdamW's is smaller than Adam-l2's, on each network."""
    of = {(r["network"], r["optimizer"]): float(r[column]) / unit for r in rows}
    networks = dict.fromkeys(r["network"] for r in rows)
    told = [f"{n} {of[n, 'AdamW']:.3g} and {of[n, 'Adam-l2']:.3g}" for n in networks]
    return "; ".join(told), all_or_part([of[n, "AdamW"] < of[n, "Adam-l2"] for n in networks])


def decoupled(rows: Rows) -> tuple[str, str]:
    """What is lost by a lambda that was chosen at another alpha."""
    told, verdict = of_the_pair(rows, "lost_mean", 1 / POINTS)
    return f"points that AdamW and Adam-l2 lose by another alpha's lambda: {told}", verdict


def smaller_error(rows: Rows) -> tuple[str, str]:
    """Differences of test errors without BN."""
    told = f"Adam-l2's error minus AdamW's, points: {by('network', rows)}"
    return told, together(map(above_zero, rows))


def more_so_deeper(rows: Rows) -> tuple[str, str]:
    """The deepest network's interval against the shallowest one's."""
    first, last = rows[0], rows[-1]
    told = f"points: {by('network', (first, last))}"
    if float(last["low"]) > float(first["high"]):
        return told, SHOWN
    return told, CONTRARY if float(last["high"]) < float(first["low"]) else IN_PART


def trains_faster(rows: Rows) -> tuple[str, str]:
    """Training losses at the end, means over seeds."""
    told, verdict = of_the_pair(rows, "train_loss")
    return f"training loss of AdamW and Adam-l2: {told}", verdict


def concentrated(rows: Rows) -> tuple[str, str]:
    """Spreads of log2 magnitudes, paired by seed."""
    told = f"Adam-l2's spread minus AdamW's, octaves: {by('network', rows, unit=1)}"
    return told, together(map(above_zero, rows))


def dispersed_with_depth(rows: Rows) -> tuple[str, str]:
    """Adam-l2's spread over the depth."""
    spreads = [(r["network"], float(r["iqr_octaves"])) for r in rows if r["optimizer"] == "Adam-l2"]
    told = "; ".join(f"{network} {octaves:.2f}" for network, octaves in spreads)
    values = [octaves for _, octaves in spreads]
    verdict = SHOWN if values == sorted(values) else IN_PART if values[-1] > values[0] else CONTRARY
    return f"Adam-l2's spread, octaves: {told}", verdict


def factor_of_the_loss(rows: Rows) -> tuple[str, str]:
    """How far a factor moves the errors."""
    moved: dict[tuple[str, str], list[float]] = {}
    for r in rows:
        if float(r["points"]):
            moved.setdefault((r["optimizer"], r["over"]), []).append(float(r["moved_mean"]))
    means = {key: POINTS * mean(values) for key, values in moved.items()}
    told = "; ".join(f"{name} over {over} {value:.1f}" for (name, over), value in means.items())
    flag = means["AdamW", "lambda"] < means["Adam-l2", "lambda"]
    return f"points that errors move: {told}", SHOWN if flag else CONTRARY


def eps_0(rows: Rows) -> tuple[str, str]:
    """Step for step without eps."""
    exact = [
        float(r["largest_relative_difference"]) == 0
        for r in rows
        if r["optimizer"] != "Adam-l2" and float(r["factor"]) == 128
    ]
    moved = max(
        float(r["largest_relative_difference"]) for r in rows if r["optimizer"] == "Adam-l2"
    )
    told = f"all bits are kept in {sum(exact)} of {len(exact)} runs at a factor of 128; "
    told += f"Adam-l2's loss moves by {100 * moved:.0f} %"
    return told, all_or_part([*exact, moved > 0.01])


def adamprox_like_adamw(rows: Rows) -> tuple[str, str]:
    """The same settings beside each other."""
    gains = [float(r["AdamW"]) - float(r["AdamProx"]) for r in rows]
    low, high = intervals.interval(gains)
    row = {"mean": str(mean(gains)), "low": str(low), "high": str(high)}
    most = POINTS * max(map(abs, gains))
    told = f"AdamW's error minus AdamProx's, points: {interval(row)} over {len(rows)} settings"
    return f"{told}, at most {most:.1f}", on_a_par(row)


def remainder(rows: Rows) -> tuple[str, str]:
    """The slopes in a plot of logarithms."""
    slopes = {r["over"]: float(r["slope_of_all"]) for r in rows}
    told = f"eta^{slopes['eta']:.2f}, lambda^{slopes['lambda']:.2f}"
    near = [abs(slopes["eta"] - 2) < 0.1, abs(slopes["lambda"] - 1) < 0.1]
    return told, all_or_part(near)


def l2_on_a_par(rows: Rows) -> tuple[str, str]:
    """AdamProxL2's error minus AdamW's; a smaller one is good, too."""
    of_l2 = [row for row in rows if row["optimizer"].startswith("AdamProxL2")]
    told = f"error minus AdamW's, points: {by('optimizer', of_l2)}"
    return told, together(SHOWN if float(r["high"]) <= PAR else on_a_par(r) for r in of_l2)


def l1_makes_zeros(rows: Rows) -> tuple[str, str]:
    """Whether half of the weights or more may be zero at the cost of at most a point."""
    dense = next(float(r["accuracy"]) for r in rows if r["training"] == "dense")
    of_l1 = [r for r in rows if r["training"] == "AdamProxL1"]
    sparse = [r for r in of_l1 if float(r["zeros"]) >= 0.5]
    good = [r for r in sparse if float(r["accuracy"]) > dense - PAR]
    told = "; ".join(
        f"{100 * float(r['zeros']):.0f} % zeros {POINTS * (float(r['accuracy']) - dense):+.1f}"
        for r in of_l1
    )
    verdict = SHOWN if good else IN_PART if sparse else CONTRARY
    return f"accuracy minus dense, points: {told}", verdict


def scale_free(rows: Rows) -> tuple[str, str]:
    """Which of the directions and decays keep every bit; M_t of AdaGrad is no part of the claim."""
    of = [(r["direction"], r["decay"], r["scale_free"] == "True") for r in rows]
    told = "; ".join(f"{direction}, {decay}" for direction, decay, free in of if free)
    as_claimed = [
        free == (direction != "SGD" and not decay.startswith("coupled"))
        for direction, decay, free in of
        if "M_t" not in decay
    ]
    return f"all bits are kept by {told or 'none'}", all_or_part(as_claimed)


def theorem_1(rows: Rows) -> tuple[str, str]:
    """The distance to the minimizer over the condition number."""
    most = {
        name: max(float(r["distance"]) for r in rows if r["algorithm"] == name)
        for name in ("AdaGrad", "SGD")
    }
    told = f"AdaGrad ends {most['AdaGrad']:.2g} away at most, gradient descent {most['SGD']:.2g}"
    return told, SHOWN if most["AdaGrad"] < 0.01 < most["SGD"] else CONTRARY


def theorem_3(rows: Rows) -> tuple[str, str]:
    """The bound in every round."""
    flags = [r["holds"] == "True" for r in rows]
    return f"the bound holds in {sum(flags)} of {len(flags)} rounds", all_or_part(flags)


def sgd_diverges(rows: Rows) -> tuple[str, str]:
    """Of SGD without BN."""
    without = [r for r in rows if r["batch_norm"] == "False"]
    flags = [r["last_loss"] == "nan" for r in without]
    smallest = min((float(r["lr"]) for r, f in zip(without, flags, strict=True) if f), default=None)
    told = "no learning rate diverges" if smallest is None else f"NaN from {smallest:g} on"
    return told, SHOWN if flags[0] else IN_PART if any(flags) else CONTRARY


def without_bn_on_ranks(rows: Rows) -> tuple[str, str]:
    """What several ranks cost, with and without BN."""
    error = {
        (r["batch_norm"], r["optimizer"], int(r["ranks"])): float(r["test_error"]) for r in rows
    }
    most = max(ranks for _, _, ranks in error)
    cost = {
        (bn, name): POINTS * (error[bn, name, most] - error[bn, name, 1])
        for bn, name, ranks in error
        if ranks == 1
    }
    told = "; ".join(
        f"{name} {'with' if bn == 'True' else 'without'} BN {value:+.1f}"
        for (bn, name), value in cost.items()
    )
    gain = POINTS * (error["False", "Adam-l2", most] - error["False", "AdamW", most])
    told = f"points that {most} ranks cost: {told}; AdamW gains {gain:+.1f} there"
    return told, SHOWN if cost["False", "AdamW"] < cost["True", "AdamW"] and gain > 0 else IN_PART


CLAIMS = (
    Claim("AdamW's iterates do not depend on the condition number",
          "Corollary 1, figure 1", "corollary-1", corollary_1),
    Claim("With BN, Adam-l2 is on a par with AdamW", "4.1, figure 2", "advantage-bn", par_with_bn),
    Claim("With BN, the best lambda is 0", "4.1, figure 2", "figure-2", no_decay_with_bn),
    Claim("AdamW decouples lambda from alpha better", "4.1, figure 2", "decoupling", decoupled),
    Claim("Without BN, AdamW has a smaller test error",
          "4.1, figure 3", "advantage", smaller_error),
    Claim("The more so, the deeper", "4.1, figure 3", "advantage", more_so_deeper),
    Claim("Without BN, AdamW trains faster", "4.1, figure 3", "figure-3", trains_faster),
    Claim("AdamW's update magnitudes are more concentrated",
          "4.1, figures 3, 7 to 12", "concentration", concentrated),
    Claim("Adam-l2's disperse with the depth", "4.1", "figure-3", dispersed_with_depth),
    Claim("A factor of the loss moves Adam-l2's errors, not AdamW's",
          "4.2, figure 4", "figure-4-over-lambda", factor_of_the_loss),
    Claim("With eps = 0 it moves no iterate of AdamW", "4.2", "loss-factor", eps_0),
    Claim("AdamProx behaves like AdamW", "4.3, figure 5", "figure-5-beside", adamprox_like_adamw),
    Claim("The remainder is O(lambda * eta^2)", "3", "taylor", remainder),
    Claim("AdamProxL2 can be on a par with AdamW", "5, figure 6", "section-5", l2_on_a_par),
    Claim("AdamProxL1 makes networks sparse", "5", "sparsity", l1_makes_zeros),
    Claim("AdaGrad's and Adam's directions are scale-free. l2 in the gradient ends that, "
          "a proximal decay does not", "3", "scale-freeness", scale_free),
    Claim("Scale-free algorithms do as well as with the best scaling",
          "Theorem 1", "theorem-1", theorem_1),
    Claim("AdaGrad with restarts converges linearly, whatever the condition number",
          "Theorem 3", "theorem-3", theorem_3),
    Claim("SGD without BN diverges even at 1e-10", "4.1", "sgd", sgd_diverges),
    Claim("Without BN, AdamW suits distributed training (an open question)",
          "5", "distributed", without_bn_on_ranks),
)  # fmt: skip


def judged(folder: Path) -> list[dict[str, str]]:
    """Of each claim, what was measured and the verdict, from the CSV in a folder."""
    result = []
    for claim in CLAIMS:
        file = folder / f"{claim.table}.csv"
        measured, verdict = "", NOT_TESTED
        if file.exists():
            with file.open(newline="") as opened:
                measured, verdict = claim.judge(list(csv.DictReader(opened)))
        row = {"claim": claim.text, "of": claim.where, "measured": measured, "verdict": verdict}
        result.append(row)
    return result
