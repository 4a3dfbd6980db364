"""A checkpoint folder on the Hugging Face hub: uploaded with its model card, without its training state."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from errors import UserError, quiet_imports, require
from LMConfig import LMConfig
from model.checkpoint.card import renew_card
from model.checkpoint.folder import CARD
from model.checkpoint.weight_files import WeightFiles

# Optimiser state, which is of use to the run alone and twice as large, and hidden files.
IGNORED = ["training/*", ".*", "*/.*"]
REMEDIES = {
    401: "the token is not valid; make one that may write, at the hub's settings",
    403: "the token may not write there; make one that may, or choose another owner",
    404: "there is no such owner or repository for this token; check the name",
}


def push(folder: Path, name: str, private: bool = False, token: str = "") -> None:
    """Upload a checkpoint folder as the repository `name` (owner/name), made where there is none. HF_ENDPOINT holds.

    Raises:
        UserError: not a checkpoint, no token, no network, or the hub refuses.
        DamagedCheckpoint: weights that are cut short.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: is an adapter, whose files name a folder of yours; push OUT/merged, of --merge")
    LMConfig.from_pretrained(folder)
    WeightFiles(folder)
    require(bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII)), f"{name}: give owner/name, such as anna/small-v3")
    with quiet_imports():  # seconds, which other commands need not wait for
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
    token = token or get_token() or ""
    require(bool(token), "push: no token; set HF_TOKEN, log in with `hf auth login`, or pass --token")
    require(token.isascii() and token.isprintable(), "push: the token has letters that no token has; copy it again")
    renew_card(folder)
    api = HfApi(token=token)
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(name).private:
            raise UserError(f"{name}: is there already, and public; make it private at the hub, or choose another name")
        api.upload_folder(
            repo_id=name, folder_path=folder, ignore_patterns=[*IGNORED], commit_message="Upload a checkpoint"
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = error.server_message or error.response.reason_phrase or "no reason given"
        raise UserError(f"{name}: the hub answered {status} ({reason}); {REMEDIES.get(status, 'try again')}") from None
    except OfflineModeIsEnabled:
        raise UserError(f"{name}: HF_HUB_OFFLINE is set; unset it to push") from None
    except (HTTPError, ConnectionError) as error:
        place = f"no connection to {constants.ENDPOINT} ({error})"
        raise UserError(f"{name}: {place}; check the network, proxy and HF_ENDPOINT, then try again") from None
    except (UserError, OSError):
        raise
    except Exception as error:  # metadata of an edited card; hf_xet raises what it likes where an upload breaks off
        cause = f": {error.__cause__}" if error.__cause__ else ""
        raise UserError(f"{name}: could not be uploaded ({error}{cause}); correct that and try again") from None
    card = folder / CARD
    front = card.read_text(encoding="utf8", errors="replace").partition("\n# ")[0] if card.is_file() else ""
    if "\nlicense: unknown" in front:
        print(f"notice: {card} states no license; write one there and push again", file=sys.stderr)
    print(f"{folder}: pushed to {constants.ENDPOINT}/{name}")
