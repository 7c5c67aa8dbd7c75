"""Which questions a plan lost and won against the full model, as a table that can be searched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from string import ascii_uppercase

from mmfast.eval.baselines import baseline_name
from mmfast.eval.records import Record, Run
from mmfast.page import table

MOST = 400
"""Questions listed per plan; a page must stay small enough to send."""

_LONGEST = 600
_HEAD = ("", "question", "expected", "full", "plan", "kind")

STYLE = """
.filter { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: .8rem 0 .2rem; }
.filter input { flex: 1 1 12rem; max-width: 24rem; }
.questions td, .questions th { text-align: left; } .questions { font-size: .9rem; }
.questions td:first-child { font-weight: 600; } .questions td { white-space: pre-line; }
"""

# Closed parts are opened for the printer and closed again afterwards.
SCRIPT = """
for (const box of document.querySelectorAll('.filter')) {
  const section = box.closest('section'), words = box.querySelector('input'), kind = box.querySelector('select');
  const count = box.querySelector('output'), rows = [...section.querySelectorAll('.questions tbody tr')];
  const apply = () => {
    const wanted = words.value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = (!kind.value || row.className === kind.value) && row.textContent.toLowerCase().includes(wanted);
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = shown + ' of ' + rows.length;
    if (wanted) for (const part of section.querySelectorAll('details.plan')) part.open = true;
  };
  words.addEventListener('input', apply);
  kind.addEventListener('change', apply);
  box.hidden = false;
  apply();
}
let closed = [];
addEventListener('beforeprint', () => {
  closed = [...document.querySelectorAll('details:not([open])')];
  for (const part of closed) part.open = true;
});
addEventListener('afterprint', () => { for (const part of closed) part.open = false; });
"""


def differences(anchor: str, runs: Sequence[Run]) -> str:
    """List, for each plan that is no baseline, the questions on which it scored otherwise than the full model.

    Args:
        anchor: an id of the page that names this part.
        runs: all runs of one task on one model.

    Returns:
        HTML; empty if there is no full model to compare with.
    """
    full = {
        run.header.setting: {record.question_id: record for record in run.records}
        for run in runs
        if baseline_name(run.header.plan) == "full"
    }
    parts = [
        _plan(run, full[run.header.setting])
        for run in runs
        if not baseline_name(run.header.plan) and run.header.setting in full
    ]
    if not parts:
        return ""
    # Without a script there is nothing that would search: the box is shown by the script.
    return f"""<h2 id="{anchor}-questions">Questions lost and won</h2>
<div class="filter screen" hidden><input type="search" aria-label="words to look for" placeholder="look for words">
<select aria-label="which questions"><option value="">lost and won</option><option value="lost">lost</option>
<option value="won">won</option></select><output class="soft"></output></div>
{"".join(parts)}"""


def _plan(run: Run, full: dict[str, Record]) -> str:
    pairs = [(full[record.question_id], record) for record in run.records if record.question_id in full]
    lost = [pair for pair in pairs if pair[1].score < pair[0].score]
    won = [pair for pair in pairs if pair[1].score > pair[0].score]
    # Where not all are listed, both kinds are.
    room = max(MOST // 2, MOST - min(len(lost), len(won)))
    listed = [(kind, pair) for kind, found in (("lost", lost), ("won", won)) for pair in found[:room]]
    rows = [(kind, _cells(kind, *pair)) for kind, pair in listed]
    missing = len(lost) + len(won) - len(rows)
    left_out = f'<p class="soft">{missing} more are in the results files.</p>' if missing else ""
    same = len(pairs) - len(lost) - len(won)
    return (
        f'<details class="plan"><summary><code>{escape(run.header.plan)}</code>: lost {len(lost)}, won {len(won)}, '
        f"same score on {same}</summary>{table(_HEAD, rows, kind='questions') if rows else ''}{left_out}</details>"
    )


def _cells(kind: str, full: Record, own: Record) -> list[str]:
    sign = f'<span class="{"bad" if kind == "lost" else "good"}">{kind}</span>'
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(ascii_uppercase, own.choices, strict=False))
    question = own.question if not own.choices or own.choices[0] in own.question else own.question + choices
    expected = ", ".join(dict.fromkeys(map(str, own.answers)))
    return [sign, _text(question), _text(expected), _answer(full), _answer(own), _text(own.category)]


def _answer(record: Record) -> str:
    if record.error:
        return f'<span class="bad">failed: {_text(record.error)}</span>'
    partly = "" if record.score in (0, 1) else f" <small>score {record.score:.2f}</small>"
    return (_text(record.prediction.strip()) or "<em>nothing</em>") + partly


def _text(text: str) -> str:
    return escape(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")
