"""Is an answer right? Functions of a row of a trajectory dataset, for `--judge examples/judges.py:NAME`."""

import re


def final_number(row):
    """The last number of the response is that of the row's `answer`, as in GSM8K (behind `####`, if that is there)."""

    def last_number(text):
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        return float(numbers[-1].replace(",", "")) if numbers else None

    expected = last_number(str(row["answer"]).rpartition("####")[2])
    return expected is not None and last_number(row["response"]) == expected
