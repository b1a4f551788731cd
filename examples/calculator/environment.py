"""The calculator: answers a turn that ends with a call, ` calc 12 + 7`, with ` result 19`. Any other turn was the last.

rollout:
  environment: examples/calculator/environment.py:Calculator
"""

import re
from typing import Any

CALL = re.compile(r" calc (\d{1,2}) \+ (\d{1,2})$")


class Calculator:
    def step(self, turns: list[str], columns: dict[str, Any]) -> str | None:
        """`turns`: what the policy wrote, what we answered, ..., what the policy wrote just now."""
        call = CALL.search(turns[-1])
        return f" result {int(call[1]) + int(call[2])}" if call else None
