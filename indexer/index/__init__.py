"""The vectors of one checkpoint in memory, searched by FAISS."""
