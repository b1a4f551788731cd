"""A response as the pieces of its tokens, and the reward of each as a colour behind it: for a terminal, and as HTML for
whoever shows that."""

from collections.abc import Sequence
from html import escape

import numpy as np
from rich.text import Text

from core.plain_text import one_line
from trainer.gallery import Shown

MOST_PIECES = 1500  # of a response in HTML, in each of its lines; a page of more is slow to open and nobody reads it


def pieces(text: str, offsets: Sequence[Sequence[int]]) -> list[tuple[str, bool]]:
    """Of each of the T tokens: the characters that it is the first to have, and whether it has some of another's.

    Joined they are `text`, each character once, less what belongs to no token. A token without characters of its own,
    such as the stop token, is ("", False), a later one of those that share a character ("", True).

    Args:
        offsets: [T, 2] code points of `text`, as core/trajectory.py has them.
    """
    out, at = [], 0
    for start, end in offsets:
        shares = start < min(at, end)
        out.append((text[max(at, start) : end], shares))
        at = max(at, end)
    return out


def shared_pieces(text: str, offsets: Sequence[Sequence[int]]) -> list[tuple[str, list[int]]]:
    """The same in order, each piece with the tokens that wrote it: those that share a character are one piece."""
    found: list[tuple[str, list[int]]] = []
    for i, (piece, shares) in enumerate(pieces(text, offsets)):
        if shares and not piece and found:
            found[-1][1].append(i)
        else:
            found.append((piece, [i]))
    return found


def heat_map(text: str, offsets: np.ndarray, rewards: np.ndarray, largest: float) -> Text:
    """`text` with each token on green for a reward, on red for a fine; `largest` is the full colour.

    A token without characters of its own, such as the stop token, shows as its number where it has one; tokens that
    share a character have one colour, that of their sum. What lies behind the end of `text` is not shown.
    """
    shown: list[tuple[str, float]] = []
    spans = offsets.tolist()
    for piece, tokens in shared_pieces(text, spans):
        reward = float(rewards[tokens].sum())
        start, end = spans[tokens[0]]
        if piece:
            shown.append((one_line(piece), reward))
        elif reward and start == end:
            shown.append((f"[{reward:+.3g}]", reward))
    return Text.assemble(*((piece, _style(reward, largest)) for piece, reward in shown))


def _style(reward: float, largest: float) -> str:
    share = min(1.0, abs(reward) / largest) if largest else 0.0
    if share == 0:
        return ""
    full = round(60 + 150 * share)
    ground = f"rgb(0,{full},0)" if reward > 0 else f"rgb({full},0,0)"
    return f"{'black' if share > 0.5 else 'white'} on {ground}"


_CSS = """body{font:13px/1.7 system-ui,sans-serif;color:#111;background:#fff;margin:8px}
.t{white-space:pre-wrap;overflow-wrap:anywhere;font-family:ui-monospace,monospace}p{margin:4px 0}
table{border-collapse:collapse}th,td{text-align:left;vertical-align:top;padding:3px 8px;border-top:1px solid #ddd}
th{white-space:nowrap;font-weight:600}.o{color:#666;font-style:italic}"""


def html(sample: Shown) -> str:
    """A page of its own: the response once for each component, for their sum and for each other number, every token on
    green above 0 and on red below, its numbers when the pointer rests on it. No script, and all text is escaped."""
    cut = shared_pieces(sample.text, sample.offsets.tolist())
    kept = cut[:MOST_PIECES]
    # Rewards of tokens that share a character add up; of what no sum makes sense the last token counts.
    lines = [("reward", sample.token_rewards, True)]
    lines += [(name, x, True) for name, x in sample.weighted.items()]
    lines += [(name, x, False) for name, x in sample.numbers.items()]
    told = [_title(sample, tokens) for _, tokens in kept]
    rows = []
    for name, x, adds in lines:
        values = [float(x[tokens].sum() if adds else x[tokens[-1]]) for _, tokens in kept]
        largest = max(map(abs, values), default=0.0)
        spans = "".join(
            _span(piece, value, largest, title if name == "reward" else "", bool(sample.written[tokens].any()))
            for (piece, tokens), value, title in zip(kept, values, told, strict=True)
        )
        total = f"<br>{x.sum():+.4g}" if adds else ""
        rows.append(f"<tr><th>{escape(name)}{total}<td class=t>{spans}")
    more = f"<p>{len(cut) - len(kept)} more pieces are not shown." if len(cut) > len(kept) else ""
    return (
        f"<!doctype html><meta charset=utf-8><style>{_CSS}</style>"
        f"<p>prompt {sample.ordinal} #{sample.k}, {int(sample.written.sum())} tokens, {escape(sample.finish_reason)}"
        f"<p class='t o'>{escape(sample.prompt)}<table>{''.join(rows)}</table>{more}"
    )


def _title(sample: Shown, tokens: list[int]) -> str:
    """What is said of a piece: every number of each of its tokens."""
    numbers = {"reward": sample.token_rewards, **sample.weighted, **sample.numbers}
    said = [", ".join(f"{name} {x[i]:+.4g}" for name, x in numbers.items()) for i in tokens]
    return "\n".join(f"token {i}: {words}" for i, words in zip(tokens, said, strict=True))


def _span(piece: str, value: float, largest: float, title: str, written: bool) -> str:
    shown = escape(piece) if piece else "&#9633;"  # a box for a token without characters
    share = min(1.0, abs(value) / largest) if largest else 0.0
    colour = "0,150,60" if value > 0 else "210,40,40"
    style = f" style='background:rgba({colour},{share:.2f})'" if share >= 0.005 else ""
    kind = "" if written else " class=o"
    told = f' title="{escape(title)}"' if title else ""
    return f"<span{kind}{style}{told}>{shown}</span>"


def markdown(sample: Shown) -> str:
    """The same for a place that shows no colours: prompt, response, sums, and which tokens earned and cost the most.

    Texts stand in indented blocks, where Markdown changes nothing.
    """
    cut = shared_pieces(sample.text, sample.offsets.tolist())
    rewards = [(float(sample.token_rewards[tokens].sum()), piece) for piece, tokens in cut]
    ranked = sorted((x for x in rewards if x[0]), key=lambda x: x[0])
    ends = [*ranked[:4], *ranked[max(4, len(ranked) - 4) :]]
    lines = [f"prompt {sample.ordinal} #{sample.k}, {int(sample.written.sum())} tokens, {sample.finish_reason}, "]
    lines[0] += f"reward {sample.total:+.4g}"
    lines += ["", *_block(sample.prompt), "", *_block(sample.text), "", "| component | reward |", "|---|---|"]
    lines += [f"| {_cell(name)} | {x.sum():+.4g} |" for name, x in sample.weighted.items()]
    lines += ["", *_block("\n".join(f"{reward:+10.4g}  {one_line(piece)!r}" for reward, piece in ends))]
    return "\n".join(lines)


def _block(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines() or [""]]


def _cell(text: str) -> str:
    return escape(text).replace("|", "\\|")
