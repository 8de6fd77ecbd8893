"""The numbers of the paper's Tables 2 to 7, under our metric names (... metrics -> runs: `compare` puts ours below).

Recalls and accuracies are shares here and percent in the paper; a metric's full name in a run is `TASK/METRIC`.
"""

from typing import NamedTuple

VLM = "VLM"
"""The row that is the paper's own model."""


class PaperTable(NamedTuple):
    """One table of the paper: method to metric to value."""

    title: str
    rows: dict[str, dict[str, float]]


def _retrieval(r1: float, r5: float | None, r10: float, median: float | None) -> dict[str, float]:
    recalls = {"recall_at_1": r1, "recall_at_5": r5, "recall_at_10": r10}
    row = {name: round(value / 100, 6) for name, value in recalls.items() if value is not None}
    return row if median is None else row | {"median_rank": median}


def _percent(metric: str, **methods: float) -> dict[str, dict[str, float]]:
    return {_METHODS.get(name, name): {metric: round(value / 100, 6)} for name, value in methods.items()}


def _caption(
    bleu3: float | None, bleu4: float, meteor: float, rouge_l: float | None, cider: float | None
) -> dict[str, float]:
    row = {"bleu3": bleu3, "bleu4": bleu4, "meteor": meteor, "rouge_l": rouge_l}
    shares = {name: round(value / 100, 6) for name, value in row.items() if value is not None}
    return shares if cider is None else shares | {"cider": cider}


_METHODS = {
    "NN_Viterbi": "NN-Viterbi",
    "TCFPN_ISBA": "TCFPN-ISBA",
    "MIL_NCE": "MIL-NCE",
    "Supervised": "Supervised (Zhukov)",
    "VLM_zero_shot": "VLM (zero-shot)",
}

PAPER: dict[str, PaperTable] = {
    "msrvtt": PaperTable(
        "Table 2: text-video retrieval on MSR-VTT",
        {
            "Random": _retrieval(0.1, 0.5, 1.0, 500),
            "MMT": _retrieval(25.8, 57.2, 69.3, 4),
            "ActBERT": _retrieval(8.6, 23.4, 33.1, 36),
            "VideoAsMT": _retrieval(14.7, None, 52.8, None),
            "HERO": _retrieval(16.8, 43.4, 57.7, None),
            "UniVL (FT-Joint)": _retrieval(20.6, 49.1, 62.9, 6),
            VLM: _retrieval(28.1, 55.5, 67.4, 4),
        },
    ),
    "youcook2": PaperTable(
        "Table 3: text-video retrieval on Youcook2",
        {
            "Random": _retrieval(0.03, 0.15, 0.3, 1675),
            "Coot": _retrieval(16.7, 40.2, 52.3, 9),
            "ActBERT": _retrieval(9.6, 26.7, 38.0, 19),
            "VideoAsMT": _retrieval(11.6, None, 43.9, None),
            "UniVL (FT-Joint)": _retrieval(22.2, 52.2, 66.2, 5),
            VLM: _retrieval(27.05, 56.88, 69.38, 4),
        },
    ),
    "coin": PaperTable(
        "Table 4: action segmentation on COIN",
        _percent(
            "frame_accuracy", NN_Viterbi=21.17, VGG=25.79, TCFPN_ISBA=34.30, CBT=53.90, MIL_NCE=61.00, ActBERT=56.95,
            VLM=68.39,
        ),
    ),
    "crosstask": PaperTable(
        "Table 5: action step localization on CrossTask",
        _percent(
            "avg_recall", Alayrac=13.3, Zhukov=22.4, Supervised=31.6, HowTo100M=33.6, MIL_NCE=40.5, UniVL=42.0,
            ActBERT=41.4, VLM_zero_shot=28.5, VLM=46.5,
        ),
    ),
    "msrvtt-qa": PaperTable(
        "Table 6: multiple-choice video question answering on MSR-VTT",
        _percent("accuracy", JSFusion=83.4, ActBERT=85.7, VLM=91.64),
    ),
    "youcook2-caption": PaperTable(
        "Table 7: video captioning on Youcook2",
        {
            "VideoBERT": _caption(6.80, 4.04, 11.01, 27.50, 0.49),
            "CBT": _caption(None, 5.12, 12.97, 30.44, 0.64),
            "ActBERT": _caption(8.66, 5.41, 13.30, 30.56, 0.65),
            "Coot": _caption(17.62, 11.09, 19.34, 37.63, None),
            "VideoAsMT": _caption(None, 5.3, 13.4, None, None),
            "UniVL": _caption(16.46, 11.17, 17.57, 40.09, 1.27),
            VLM: _caption(17.78, 12.27, 18.22, 41.51, 1.3869),
        },
    ),
}  # fmt: skip
