"""The backbone: its checkpoint folder, and the embeddings it makes."""
