"""A SciCat backend in memory: the behaviour that an archive meets, strict checks and truncated lists included.

It needs starlette, uvicorn and msgspec. ``fixtures`` has it for tests, ``python -m tests.scicat_fake`` as a server.
"""
