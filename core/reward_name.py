"""How the configuration names a reward component: `rewards.NAME.fn`.

my_rewards.py:consistency            a function or class in a file
my_package.rewards:consistency       one in an installed package
verl:my_rewards.py:compute_score     one written for verl, or for OpenRLHF (openrlhf:...:reward_func)
http://127.0.0.1:8000                a component of that name on a server (`tokenppo serve-reward`)
openrlhf:http://host:5000/get_reward a reward model behind OpenRLHF's protocol
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

ADAPTERS = ("verl", "openrlhf")


@dataclass(frozen=True)
class RewardName:
    target: str  # of a file or package its path or name, of a server the URL
    attribute: str = ""
    adapter: str = ""  # one of ADAPTERS, or none

    @classmethod
    def parse(cls, text: str) -> "RewardName":
        """Raises ValueError, with what to write instead, for text that is none of the forms above."""
        prefix, colon, rest = text.partition(":")
        adapter = prefix if colon and prefix in ADAPTERS and ":" in rest else ""
        text = rest if adapter else text
        if text.startswith(("http://", "https://")):
            if adapter == "verl":
                raise ValueError("verl has no protocol for reward servers; write verl:path/file.py:compute_score")
            return cls(text, adapter=adapter)
        target, colon, attribute = text.rpartition(":")
        if not (colon and target and attribute):
            raise ValueError("write `pkg.mod:fn` or `path/file.py:fn`")
        return cls(target, attribute, adapter)

    @property
    def is_url(self) -> bool:
        return not self.attribute

    @property
    def file(self) -> Path | None:
        """The file it is in; None for a package or a server."""
        in_file = not self.is_url and (self.target.endswith(".py") or "/" in self.target)
        return Path(self.target).expanduser() if in_file else None

    def anchored(self, folder: Path) -> "RewardName":
        """The same with a relative path made absolute against `folder`."""
        if self.file is None or not self.target.endswith(".py"):
            return self
        return replace(self, target=os.path.normpath((folder / self.file).absolute()))

    def __str__(self) -> str:
        prefix = f"{self.adapter}:" if self.adapter else ""
        return f"{prefix}{self.target}" + (f":{self.attribute}" if self.attribute else "")
