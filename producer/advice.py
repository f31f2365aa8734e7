"""What to do about a job that no running node can work on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from imagemill.shared.engines import find_engine, split_lane
from imagemill.shared.messages import Node


def advice(lane: str, nodes: Iterable[Node], parts: Iterable[str] = ()) -> str | None:
    """Why no node can work in a lane, or has the `parts` that a job needs, and the commands that help; None if one can.

    A model that isn't in the catalogue may be the user's own, or a typo, so the nearest name is suggested.
    """
    nodes = list(nodes)
    offered = {offer for node in nodes for offer in node.lanes}
    if lane in offered:
        return _missing(parts, [node for node in nodes if lane in node.lanes])
    operation, engine, model = split_lane(lane)
    if not model:
        return f"no worker offers {lane}; start one with `imagemill worker --cpu`"
    catalogue = find_engine(operation, engine).models
    others = {name for row, of, name in map(split_lane, offered) if (row, of) == (operation, engine)}
    reason = f"no worker offers {lane}"
    command = f"`imagemill models pull {model}`"
    if model not in catalogue:
        close = difflib.get_close_matches(model, sorted({*catalogue, *others}), n=1, cutoff=0.5)
        reason += ", and the catalogue has no such model" + (f"; did you mean {close[0]!r}?" if close else "")
        command = f"`imagemill models add {model} FILE`"
    if others:
        return f"{reason}; make one offer it with {command}"
    return f"{reason}; start one with {command} and `IMAGEMILL_WORKER__ENGINES='[\"{engine}\"]' imagemill worker`"


def _missing(parts: Iterable[str], nodes: Iterable[Node]) -> str | None:
    """What to do about LoRAs, ControlNets and VAEs that no node can use. Nodes of older versions may have them all."""
    known = [node.parts for node in nodes]
    missing = [part for part in parts if not any(have is None or part in have for have in known)]
    if not missing:
        return None
    commands = f"`imagemill models pull {missing[0]}`, or `imagemill models add {missing[0]} SOURCE` if it is your own"
    return f"no worker that offers the model has {' or '.join(missing)}, so the job waits; get it with {commands}"
