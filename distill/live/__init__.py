"""A student live in the browser: the protocol, a viewer's stream, the engine that serves many, talkers, the page."""
