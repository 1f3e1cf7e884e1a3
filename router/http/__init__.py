"""The OpenAI API over HTTP, as one more face of the router: JSON in, generations of the router, JSON or events out.

Needs the extra `http`; nothing here is imported unless `http_listen` asks for it.
"""
