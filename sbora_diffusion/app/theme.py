"""How the page looks: one accent, fonts of the system only, light and dark."""

from pathlib import Path

import gradio as gr

from sbora_diffusion.app.rows import ROW_CSS

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8") + ROW_CSS
HEAD = f"<script>{(Path(__file__).parent / 'page.js').read_text(encoding='utf-8')}</script>"


def theme() -> gr.themes.Base:
    """Nothing is fetched."""
    soft = gr.themes.Soft(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=["system-ui", "Segoe UI", "Roboto", "Helvetica", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"],
    )
    plain = "transparent"
    return soft.set(
        block_title_background_fill=plain,
        block_title_background_fill_dark=plain,
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_text_weight="600",
        block_label_background_fill=plain,
        block_label_background_fill_dark=plain,
        block_label_text_color="*body_text_color_subdued",
        block_label_text_color_dark="*body_text_color_subdued",
        block_border_width="1px",
        block_border_width_dark="1px",
        block_border_color="*border_color_primary",
        block_shadow="none",
        input_border_width="1px",
        input_border_width_dark="1px",
        input_border_color="*neutral_300",
        input_shadow="none",
        checkbox_border_color="*neutral_400",
        checkbox_label_border_width="1px",
        checkbox_label_border_color="*neutral_300",
        checkbox_label_shadow="none",
        button_border_width="1px",
        button_border_width_dark="1px",
        button_secondary_border_color="*neutral_300",
        button_secondary_shadow="none",
        button_primary_shadow="none",
        slider_color="*primary_600",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
    )
