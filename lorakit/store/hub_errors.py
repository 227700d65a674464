"""What huggingface_hub raises, said in one line with the next thing to type."""

import errno
from pathlib import Path

from lorakit.errors import HubError, LorakitError, ResourceError
from lorakit.store.hub import near
from lorakit.store.hub_id import HubId

LOGIN = "hf auth login"


def explained(error: Exception, wanted: HubId) -> LorakitError:
    """The error to raise in place of one that came out of `snapshot_download`.

    A missing cache entry may only be what followed when the hub refused: then that is told.
    """
    from huggingface_hub import constants, errors

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "Free some, or set HF_HOME to a folder on a larger disk."
        return ResourceError(f"no space left in {constants.HF_HUB_CACHE}.", hint=hint)
    if isinstance(error, errors.LocalEntryNotFoundError):
        if not isinstance(error.__cause__, errors.HfHubHTTPError):
            return _not_cached(wanted)
        error = error.__cause__
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, wanted)
    hint = "Try again: what was downloaded is kept."
    return HubError(f"{wanted.repo}: {type(error).__name__}: {_line(error)}.", hint=hint)


def _not_cached(wanted: HubId) -> HubError:
    from huggingface_hub import constants

    at = f" --revision {wanted.revision}" if wanted.revision else ""
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
        hint = f"Once, with a network: HF_HUB_OFFLINE=0 hf download {wanted.repo}{at}"
    else:
        why = f"{constants.ENDPOINT} cannot be reached"
        hint = "Check the network (and HF_ENDPOINT), then try again."
    return HubError(
        f"{wanted.reference!r} is no path here, the hub's cache has not all of it, and {why}.",
        hint=hint,
    )


def _refused(error: Exception, wanted: HubId) -> HubError:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{wanted.repo}"
    if isinstance(error, errors.GatedRepoError):
        hint = f"Accept its terms at {page}, then: {LOGIN}"
        return HubError(f"{wanted.repo} is gated, and this user has no access.", hint=hint)
    if isinstance(error, errors.RepositoryNotFoundError):
        close = near(Path(wanted.reference))
        return HubError(
            f"{wanted.reference!r} is no path here, and the hub has no model {wanted.repo!r}.",
            hint=f"{close} If it is a private one: {LOGIN}".strip(),
        )
    if isinstance(error, errors.RevisionNotFoundError):
        hint = f"Its commits: {page}/commits/main"
        return HubError(f"{wanted.repo} has no revision {wanted.revision!r}.", hint=hint)
    status = getattr(getattr(error, "response", None), "status_code", "")
    said = getattr(error, "server_message", None) or error
    hint = f"A token with access may help: {LOGIN}" if status in (401, 403) else "Try again later."
    return HubError(f"{wanted.repo}: the hub answered {status}: {_line(said)}.", hint=hint)


def _line(text: object) -> str:
    return (str(text).strip().splitlines() or [""])[0][:200].rstrip(".")
