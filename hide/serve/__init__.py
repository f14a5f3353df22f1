"""Answers over HTTP, in OpenAI's chat-completions format: what `hide serve` starts.

`wire` reads requests and writes replies, `app` has the routes, `server` the sockets; `engine` says what an engine is,
and has the one that runs everything on one thread; `local` answers there with a model of this process.
"""
