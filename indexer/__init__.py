"""Keep reference images in Postgres and their vectors in a FAISS index."""
