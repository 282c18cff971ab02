"""An HTTP server around one LLM that speaks OpenAI's API: docs/server.md. It needs the extra `server`."""
