"Sphinx's settings, for build.py"
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from nbdoc import cfg, doc_url, modules, pages, root, site
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from sphinx.util.logging import getLogger

logger = getLogger(__name__)
project = html_title = site.title
author = copyright = f'the {cfg.lib_name} authors'
version = release = cfg.version
extensions = ['myst_nb', 'sphinx_copybutton'] + ['sphinx_sitemap']*bool(doc_url)
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['attrs_inline', 'dollarmath']
myst_heading_anchors = 6
html_theme = site.theme
html_baseurl = doc_url
sitemap_url_scheme = '{link}'
html_static_path = ['_static']
html_css_files = ['custom.css']
html_copy_source = html_show_sourcelink = html_use_index = False
pygments_style,pygments_dark_style = 'friendly','monokai'

def anchors(app, doctree):
    "nbdev's anchors (`#extcallback.metric`), and the symbols in the search index and in objects.inv"
    symbols = pages[f'{app.env.docname}.html'].symbols
    for s in doctree.findall(nodes.section):
        name = s[0].astext()
        anchor = name.lower()
        if anchor not in symbols: continue
        if anchor not in s['ids']: s['ids'].append(anchor)
        kind = 'method' if '.' in name else 'class' if name[0].isupper() else 'function'
        app.env.get_domain('py').note_object(symbols[anchor], kind, anchor, location=s)

def source_pages(app):
    "A page for each module, with an anchor for each line"
    fmt = HtmlFormatter(linenos='inline', linespans='L')
    for mod,syms in modules.items():
        code = highlight((root/next(iter(syms.values()))[1]).read_text(), PythonLexer(), fmt)
        body = f'<h1>{mod}</h1>' + code.replace('id="L-', 'id="L')
        yield f'source/{mod}', dict(title=mod, body=body), 'page.html'

def repo_links(app, pagename, templatename, context, doctree):
    "View and edit links to the notebook that the page came from"
    if p := pages.get(f'{pagename}.html'):
        url = f'{cfg.git_url}/{{}}/{cfg.branch}/nbs/{p.rel.as_posix()}'
        context.update(theme_source_view_link=url.format('blob'), theme_source_edit_link=url.format('edit'))

def math(self, node):
    "MathML, which browsers show without a script"
    try: xml = tex2mathml(node.astext())
    except MathError as e: logger.warning(e, location=node)
    else:
        if isinstance(node, nodes.math_block): xml = xml.replace('<math ', '<math display="block" ', 1)
        self.body.append(xml)
    raise nodes.SkipNode

def setup(app):
    app.connect('doctree-read', anchors)
    app.connect('html-collect-pages', source_pages)
    if cfg.git_url: app.connect('html-page-context', repo_links)
    app.add_html_math_renderer('mathml', (math, None), (math, None))
