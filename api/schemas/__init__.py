"""What the API says, one pydantic model per JSON object."""
