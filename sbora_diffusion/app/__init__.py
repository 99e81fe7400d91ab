"""The Gradio app: one file for each tab, and beside them, without gradio, what they do."""
