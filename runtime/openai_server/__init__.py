"""OpenAI's HTTP API over one engine, and a page to watch it decode."""
