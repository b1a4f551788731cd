"""Whether W&B would find credentials. It asks nobody, shows nothing, and imports nothing of W&B's."""

import netrc
import os
from configparser import ConfigParser
from configparser import Error as ConfigError
from pathlib import Path
from urllib.parse import urlsplit


def logged_in(working_folder: Path) -> bool:
    """Whether W&B would find credentials for its host: in the environment, its settings files, or netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = ConfigParser(interpolation=None)
    system = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser() / "settings"
    try:
        settings.read([system, working_folder / "wandb" / "settings"])
    except (ConfigError, OSError, UnicodeDecodeError):
        pass  # W&B skips a file that it cannot read
    found = dict(settings["default"]) if settings.has_section("default") else {}
    if found.get("api_key"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or found.get("base_url") or "https://api.wandb.ai").netloc
    named = os.environ.get("NETRC")
    files = [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    file = next((file for file in files if file.exists()), None)
    try:
        entry = netrc.netrc(file).authenticators(host) if file else None
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError):
        return False
    return bool(entry and entry[2])
