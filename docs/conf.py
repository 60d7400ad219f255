"""Sphinx configuration: `make docs` builds docs/_build/html without a network; warnings are errors."""

import re

import diffseg

project = 'diffseg'
author = 'the diffseg authors'
release = diffseg.__version__
version = release
language = 'en'

extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.autosummary', 'sphinx.ext.napoleon', 'sphinx_copybutton']
templates_path = ['_templates']
exclude_patterns = ['_build']
nitpicky = True
nitpick_ignore_regex = [('py:class|py:exc', '.*')]  # types in signatures; pages refer to Python objects as {py:obj}

myst_enable_extensions = ['colon_fence', 'deflist']
myst_heading_anchors = 3
nb_execution_mode = 'off'  # tests execute them
nb_output_stderr = 'remove'  # progress bars

default_role = 'code'  # of `text` in docstrings
python_maximum_signature_line_length = 100
autodoc_member_order = 'bysource'
autodoc_mock_imports = ['pyarrow', 'ray']  # an extra that is large
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [('Fields', 'params_style'), ('Meta information', 'params_style')]

html_theme = 'furo'
html_title = f'diffseg {release}'
html_static_path = ['_static']
html_css_files = ['diffseg.css']
html_show_sphinx = False

linkcheck_timeout = 20

# Docstrings are Markdown of a simple kind, which autodoc would read as reStructuredText.
FENCE = re.compile(r'^( *)```(\w*)\n(.*?)^\1```$', re.S | re.M)
CODE_OR_MARKUP = re.compile(r'``[^`]+``|`[^`]+`(?P<suffix>\w?)|^ *\* |(?P<markup>[*|]|(?<=\w)_(?!\w))', re.M)


def markdown_to_rst(app, what, name, obj, options, lines):
    """Fences become directives; outside of code, `*` and `|` are plain characters; a word may go on after code."""
    code, texts = [], []

    def directive(match: re.Match) -> str:
        indent, language, body = match.groups()
        body = ''.join(f'    {line}' if line.strip() else line for line in body.splitlines(keepends=True))
        code.append(f'{indent}.. code-block:: {language or "text"}\n\n{body}')
        return f'\0{len(code) - 1}\0'

    def escape(match: re.Match) -> str:
        if match['markup']:
            return f'\\{match[0]}'
        return f'{match[0][:-1]}\\ {match["suffix"]}' if match['suffix'] else match[0]

    texts = CODE_OR_MARKUP.sub(escape, FENCE.sub(directive, '\n'.join(lines)))
    lines[:] = re.sub('\0(\\d+)\0', lambda match: code[int(match[1])], texts).split('\n')


def setup(app):
    app.connect('autodoc-process-docstring', markdown_to_rst, priority=400)  # before napoleon, which reads sections
