# SPDX-License-Identifier: Apache-2.0
"""Pages about prompts and circuits: one HTML file each, with all that it needs.

A page is a list of parts: plain values, made in `parts` (rankings, heat maps, texts, tables) and in
`graph`, `attention` and `curves` (which a script of the page draws, with d3), and a template for
each kind. `page` puts them together; `circuits` says what belongs on the page of circuits.
"""
