# SPDX-License-Identifier: Apache-2.0
"""The page of the command line, from the options and help texts of `mikernels.cli`."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from mikernels.cli import app

    command = get_command(app)
    context = command.make_context("mikernels", [], resilient_parsing=True)
    text = get_docs_for_click(obj=command, ctx=context, name="mikernels", title="Command line")
    files.append(File.generated(config, "reference/command-line.md", content=text))
    return files
