"""Scorers: what an answer is worth, as functions of strings and numbers.

Every rule here moves a score by points, so each is named after the tool whose numbers it reproduces, and
quirks of that tool are kept.

>>> from mmfast.eval.metrics import vqa_official, anls_docvqa, priority_extract
>>> vqa_official("two", ["2"] * 5 + ["two"] * 5)
1.0
>>> anls_docvqa("1978", ["1987"])
0.5
>>> priority_extract("The best answer is: B", "ABCD")
'B'
"""

from __future__ import annotations

from mmfast.eval.metrics.anls import anls_docvqa, anls_stvqa, levenshtein
from mmfast.eval.metrics.boxes import Box, find_box, intersection_over_union
from mmfast.eval.metrics.caption import CiderD, cider_d, ptb_lite
from mmfast.eval.metrics.choice import (
    PARSERS,
    guess,
    letters_of,
    longvideobench,
    mmbench_rules,
    mmmu_style,
    mvbench,
    priority_extract,
    scienceqa,
    seed_first_char,
)
from mmfast.eval.metrics.judge import Judge, Request, Verdict, read_replies, read_verdict, write_requests
from mmfast.eval.metrics.numbers import mmmu_open, relaxed_accuracy
from mmfast.eval.metrics.text import contains, exact, normalise_evalai, normalise_gqa, normalise_vqa
from mmfast.eval.metrics.vqa import gqa, textvqa_evalai, vqa_lmms_eval, vqa_official
from mmfast.eval.metrics.yes_no import YesNoFigures, mme_label, mme_scores, pope_label, yes_no_figures

__all__ = [
    "PARSERS",
    "Box",
    "CiderD",
    "Judge",
    "Request",
    "Verdict",
    "YesNoFigures",
    "anls_docvqa",
    "anls_stvqa",
    "cider_d",
    "contains",
    "exact",
    "find_box",
    "gqa",
    "guess",
    "intersection_over_union",
    "letters_of",
    "levenshtein",
    "longvideobench",
    "mmbench_rules",
    "mme_label",
    "mme_scores",
    "mmmu_open",
    "mmmu_style",
    "mvbench",
    "normalise_evalai",
    "normalise_gqa",
    "normalise_vqa",
    "pope_label",
    "priority_extract",
    "ptb_lite",
    "read_replies",
    "read_verdict",
    "relaxed_accuracy",
    "scienceqa",
    "seed_first_char",
    "textvqa_evalai",
    "vqa_lmms_eval",
    "vqa_official",
    "write_requests",
    "yes_no_figures",
]
