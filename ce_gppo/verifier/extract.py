r"""Finding the answer in a response: in the last \boxed{}, in <answer></answer>, after ####, after "answer is".

Each function takes a response and returns the answer without white space around it, or None if there is none. It takes
linear time.
"""

import re


def last_box(response: str) -> str | None:
    """The content of the last \\boxed{} or \\fbox{}; None if there is none, or it is empty, or it is never closed."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*\{", response))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(response, start):  # \\. steps over escaped braces
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return response[start : brace.start()].strip() or None
    return None


def last_tag(response: str) -> str | None:
    """The text between the last <answer></answer>."""
    before, end, _ = response.rpartition("</answer>")
    _, begin, answer = before.rpartition("<answer>")
    return (end and begin and answer.strip()) or None


def after_hashes(response: str) -> str | None:
    """The rest of the line after the last ####, as in GSM8K. Without ####: the last box."""
    _, hashes, rest = response.rpartition("####")
    return rest.partition("\n")[0].strip() or None if hashes else last_box(response)


def choice_letter(response: str) -> str | None:
    """The content of the last box. Without a box: the capital letter after the last "answer is", "answer:" or ####.

    None if two letters stand there: `C or D`, `C, D`.
    """
    letters = re.findall(
        r"(?:[Aa]nswer(?: is)?:?|ANSWER:?|####)[ \t*$]{0,4}(?:\\(?:text|textbf|mathrm)\{|\\\()?\(?([A-Z])(?![A-Za-z])"
        r"([)*$} ]{0,4}(?:,|/|&|or|and) ?(?:or |and )?[(*$]{0,4}[A-HJ-Z](?![A-Za-z]))?",
        response,
    )
    return last_box(response) or (letters[-1][0] if letters and not letters[-1][1] else None)


def any_answer(response: str) -> str | None:
    """The content of the last <answer></answer>. Without these tags: the last box."""
    return last_tag(response) or last_box(response)


def after_thinking(response: str) -> str:
    """The text after the last </think>; "" if <think> was opened again, or if there is no </think>.

    Without </think> the thinking was cut: the prompt may have opened it, as DeepSeek-R1's chat template does.
    """
    _, end, rest = response.rpartition("</think>")
    return rest if end and "<think>" not in rest else ""
