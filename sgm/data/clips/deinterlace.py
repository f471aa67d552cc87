"""One frame for the two fields of an interlaced one."""

from collections.abc import Iterator
from fractions import Fraction

import av
import av.error
from av.filter import Graph


def deinterlaced(frames: Iterator[av.VideoFrame], time_base: Fraction | None) -> Iterator[av.VideoFrame]:
    """Yield frames, from the first interlaced one on through FFmpeg's bwdif, which changes interlaced frames alone.

    Args:
        frames: decoded, in the order in which they are shown.
        time_base: of their times.
    """
    graph, made_for = None, None
    for frame in frames:
        kind = frame.width, frame.height, frame.format.name
        if graph is not None and kind != made_for:  # a graph takes frames of one kind
            yield from _rest(graph)
            graph = None
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if graph is None:
            graph, made_for = _graph(frame, time_base), kind
        graph.vpush(frame)
        yield from _pulled(graph)
    if graph is not None:
        yield from _rest(graph)


def _graph(frame: av.VideoFrame, time_base: Fraction | None) -> Graph:
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time_base)
    last = graph.add("buffersink")
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), last).configure()
    return graph


def _rest(graph: Graph) -> Iterator[av.VideoFrame]:
    graph.vpush(None)
    yield from _pulled(graph)


def _pulled(graph: Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            yield graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
