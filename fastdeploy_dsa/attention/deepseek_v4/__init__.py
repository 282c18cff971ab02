"""DeepSeek-V4: attention to a window of rows and to compressed entries, an abstract layer and its platforms."""
