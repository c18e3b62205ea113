"""The numbers that GLM-130B's paper (arXiv 2210.02414) and repository report, by the names of their task files."""

from __future__ import annotations

_FEWCLUE = "GLM-130B {}, ERNIE Titan 3.0 260B {} (zero-shot)"

PAPER = {
    "LAMBADA": "GLM-130B 80.2 (zero-shot, bidirectional)",
    "LAMBADA-unidirectional": "GLM-130B 75.3 (zero-shot, left to right)",
    "MMLU": "GLM-130B 44.8 (5-shot; average weighted by questions)",
    "BIG-bench-lite": "GLM-130B 13.31, 14.91, 15.12 (0-, 1-, 3-shot; mean of the normalised scores of 24 tasks; "
    "GPT-3 4.35, 11.34, 13.18)",
    "Pile": "GLM-130B 0.634 bits a byte, weighted (18 sets; Jurassic-1 0.650, GPT-3 0.742)",
    "WikiText-2": "GLM-130B 10.901 (word perplexity; repository, docs/quantization.md)",
    "WikiText-103": "GLM-130B 10.759 (word perplexity; repository, docs/quantization.md)",
    "Penn Treebank": "GLM-130B 18.964 (word perplexity; repository, docs/quantization.md)",
    "glue_cola": "GLM-130B max 65.197, median 57.622, mean 57.526 (example run in the repository)",
    "CROWS": "GLM-130B 65.8 overall (OPT-175B 69.5, GPT-3 67.2; lower is less biased)",
    "StereoSet": "GLM-130B overall LMS 86.0, SS 57.3, ICAT 73.5",
    "ETHOS_zeroshot": "GLM-130B 68.8",
    "ETHOS_oneshot": "GLM-130B 79.1",
    "ETHOS_fewshot_single": "GLM-130B 79.7 (few-shot, binary)",
    "ETHOS_fewshot_multi": "GLM-130B 85.8 (few-shot, multiple choice)",
    "EPRSTMT": _FEWCLUE.format(92.5, 88.8),
    "OCNLIF": _FEWCLUE.format(73.8, 53.8),
    "BUSTM": _FEWCLUE.format(77.5, 64.4),
    "CHIDF": _FEWCLUE.format(90.1, 87.1),
    "CLUEWSCF": _FEWCLUE.format(77.4, 53.5),
    "C3": _FEWCLUE.format(77.5, 54.9),
    "CLUEWSC2020": _FEWCLUE.format(83.9, 81.1),
    "CMNLI": _FEWCLUE.format(77.0, 51.7),
    "DRCD": _FEWCLUE.format(77.1, 29.5),
    "OCNLI_50K": _FEWCLUE.format(74.7, 44.6),
    "AFQMC": _FEWCLUE.format(71.2, 69.0),
    "CMRC2018": _FEWCLUE.format(55.7, 16.6),
}
