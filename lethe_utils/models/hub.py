"""Models from the hub: a snapshot at one commit, without pickles and without code."""

from pathlib import Path

from lethe_utils.errors import LetheError, reason
from lethe_utils.models import inspect


def download(hub_id: str, revision: str | None) -> Path:
    """A hub model's folder, fetched once (resumed when interrupted) and checked.

    Raises:
        LetheError: the name, the revision or the network is wrong, or weights are not safetensors.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    patterns = {"allow_patterns": inspect.HUB_FILES, "ignore_patterns": inspect.HUB_IGNORED}
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, **patterns))
    except GatedRepoError:
        raise LetheError(
            f"hub_id {hub_id}: access is gated; accept its licence and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise LetheError(f"hub_id {hub_id}: no such model on the hub; check the name") from None
    except Exception as error:  # whatever the hub client raises, the user's fix is the same
        raise LetheError(
            f"hub_id {hub_id}: download failed ({reason(error)}); check the network and rerun, "
            "finished files are kept"
        ) from None
    inspect.check_folder(folder)
    inspect.check_small_files(folder)
    inspect.check_finite(inspect.weight_files(folder))
    return folder
