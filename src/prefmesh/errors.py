"""What a user did wrong (`InputError`), what a run did wrong (`Diverged`), and what other processes did (`PeerLost`)."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Input that is refused before any work starts.

    The message is one line: where (file and row, or the config key's path), what was found, what is allowed.
    The command line prints it without a traceback and exits with code 2.
    """


class Diverged(RuntimeError):
    """Loss or parameters stopped being finite; the last good checkpoint is kept. Exit code 3."""


class PeerLost(RuntimeError):
    """Another process stopped answering; what was written stays, and the run can be resumed. Exit code 4."""


def unknown_name(where: str, found: str, allowed: Iterable[str], *, kind: str = "name") -> InputError:
    """The error for a name that is not in a registry, with the nearest valid one.

    >>> print(unknown_name("method.graph", "rnig", ["ring", "star"]))
    method.graph: unknown name 'rnig'; did you mean 'ring'? Allowed: ring, star
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(str(found), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return InputError(f"{where}: unknown {kind} {found!r}{hint} Allowed: {', '.join(names)}")
