"""The server: pictures on request by HTTP and WebSocket, drawn in small batches by one worker thread.

order (what is asked for) ─> batcher (what is drawn together, and when) ─> drawer (the diffusers pipeline)
guard (who may ask) ─> openai_api, live (how one asks) ─> app (all of it, one ASGI application)
"""
