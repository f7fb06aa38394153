"Sphinx's settings, for build.py"
import re
from functools import cache

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from nbdoc import cfg, doc_url, guided, lookup, modules, pages, root, site
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from sphinx.search.en import SearchEnglish
from sphinx.util.logging import getLogger

logger = getLogger(__name__)
SearchEnglish.stem = cache(SearchEnglish.stem)      # a few words make up most of the text
project = site.title
author = copyright = f'the {cfg.lib_name} authors'
version = release = cfg.version
html_title = f'{project} {version}'
extensions = ['myst_nb', 'sphinx_copybutton'] + ['sphinx_sitemap']*bool(doc_url)
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst'
nb_code_prompt_show,nb_code_prompt_hide = 'Show the code','Hide the code'
myst_enable_extensions = ['attrs_inline', 'dollarmath']
myst_heading_anchors = 6
html_theme = site.theme
html_baseurl = doc_url
sitemap_url_scheme = '{link}'
html_static_path = ['_static']
html_css_files = ['custom.css']
html_search_scorer = str(root/'docs'/'scorer.js')
html_copy_source = html_show_sourcelink = html_use_index = False
pygments_style,pygments_dark_style = 'friendly','monokai'

def anchors(app, doctree):
    "nbdev's anchors (`#extcallback.metric`), and the symbols in the search index and in objects.inv"
    html = f'{app.env.docname}.html'
    symbols = pages[html].symbols if html in pages else {}
    for s in doctree.findall(nodes.section):
        name = s[0].astext()
        if name not in symbols: continue
        anchor = name.lower()
        if anchor not in s['ids']: s['ids'].append(anchor)
        page = lookup.syms.get(name, [f'own:{html}'])[0]
        if not page.startswith(f'own:{html}'): continue       # the guide has it
        kind = 'method' if '.' in name else 'class' if name[0].isupper() else 'function'
        app.env.get_domain('py').note_object(symbols[name], kind, anchor, location=s)

def name_columns(app, doctree, docname):
    "The head of its column in each cell but the first: a narrow screen shows rows as lists"
    for table in doctree.findall(nodes.table):
        head,*rows = table.findall(nodes.row)
        for row in rows:
            for name,cell in [*zip(head, row)][1:]:
                if cell.children: cell[0].insert(0, nodes.inline('', name.astext(), classes=['column']))

def source_pages(app):
    "A page for each module, with an anchor for each line"
    fmt = HtmlFormatter(linenos='inline', linespans='L')
    for mod,syms in modules.items():
        code = highlight((root/next(iter(syms.values()))[1]).read_text(), PythonLexer(), fmt)
        body = f'<h1>{mod}</h1>' + code.replace('id="L-', 'id="L')
        yield f'source/{mod}', dict(title=mod, body=body), 'page.html'

def names_in_sidebar(app, pagename, templatename, context, doctree):
    "Below each page of the guide, the names that it explains"
    tree = context['furo_navigation_tree']
    for html,names in guided.items():
        if not names: continue
        url = context['pathto'](html.removesuffix('.html'))
        start = '' if url=='#' else url
        item = '<li class="toctree-l2"><a class="reference internal" href="{}#{}">{}</a></li>'
        items = ''.join(item.format(start, o.lower(), o) for o in names)
        link = rf'(<a [^>]*href="{re.escape(url)}"[^>]*>.*?</a>)'
        tree = re.sub(link, rf'\1<ul>{items}</ul>', tree, count=1)
    context['furo_navigation_tree'] = tree

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
    app.connect('doctree-resolved', name_columns)
    app.connect('html-collect-pages', source_pages)
    app.connect('html-page-context', names_in_sidebar, priority=900)      # after the theme's own
    if cfg.git_url: app.connect('html-page-context', repo_links)
    app.add_html_math_renderer('mathml', (math, None), (math, None))
