"""Methods of fusion, one a file: its formulas and sources, which problems it poses, in which form it takes parents."""

from fusionpl.fusion.methods.method import Method
from fusionpl.fusion.methods.one_stream import ONE_STREAM
from fusionpl.fusion.methods.transport import TRANSPORT

METHODS: dict[str, Method] = {"transport": TRANSPORT, "joint": ONE_STREAM}
