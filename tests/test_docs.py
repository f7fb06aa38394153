"The docs site builds without a warning or a dead link and has every symbol; README.md is nbs/index.ipynb"
import builtins, gc, re, subprocess, sys
from importlib import import_module
from inspect import getdoc
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup
from fastcore.docments import docments
from fastai_callbacks_ext._modidx import d

root = Path(__file__).resolve().parent.parent
run = """
import sys; sys.path.insert(0, 'docs')
from build import *
dst = Path(sys.argv[1])
nbdoc.load(); write_readme(dst); sys.exit(write_site(dst/'site'))
"""

@pytest.fixture(scope='session')
def built(tmp_path_factory):
    "Folder with README.md and the site, and how the build ended"
    dst = tmp_path_factory.mktemp('docs')
    return dst,subprocess.run([sys.executable, '-c', run, dst], cwd=root, capture_output=True, text=True)

@pytest.fixture(scope='session')
def pages(built):
    res = {f:BeautifulSoup(f.read_text(), 'html.parser') for f in (built[0]/'site'/'html').rglob('*.html')}
    gc.freeze()     # a million objects, which collections need not look at
    return res

@pytest.fixture(scope='session')
def tags(pages): return {f: page.find_all(True) for f,page in pages.items()}

@pytest.fixture(scope='session')
def ids(tags): return {f: {o['id']: o for o in os if 'id' in o.attrs} for f,os in tags.items()}

def test_builds(built, pages):
    assert built[1].returncode==0, built[1].stdout+built[1].stderr
    assert pages

def test_readme_in_sync(built):
    images = [o.name for p in (root,built[0]) for o in (p/'docs'/'_static').glob('readme-*.png')]
    for f in ['README.md', *{f'docs/_static/{o}' for o in images}]:
        assert (root/f).read_bytes()==(built[0]/f).read_bytes(), f'{f}: run `python docs/build.py --readme`'

def _outside(url): return bool(urlsplit(url).scheme or urlsplit(url).netloc)

def _dead(file, url, ids):
    "Does the internal `url` in `file` lead nowhere?"
    u = urlsplit(url)
    f = (file.parent/unquote(u.path)).resolve() if u.path else file
    return not f.is_file() or (u.fragment and f in ids and unquote(u.fragment) not in ids[f])

def test_no_dead_links(tags, ids):
    urls = [(f, o[a]) for f,os in tags.items() for o in os for a in ('href','src') if a in o.attrs]
    assert not [(f.name, u) for f,u in urls if not u or u!='#' and not _outside(u) and _dead(f, u, ids)]

def test_no_dead_links_in_markdown(built, ids):
    html = built[0]/'site'/'html'
    for base,fs in ((html, [*html.rglob('*.md'), html/'llms-full.txt']), (root, [built[0]/'README.md'])):
        for f in fs:
            urls = re.findall(r'\]\(([^)\s]+)\)', re.sub(r'^```.*?^```', '', f.read_text(), flags=re.M|re.S))
            f = base/f.name if base==root else f
            assert not [u for u in urls if u[0]!='#' and not _outside(u) and _dead(f, u, ids)], f

def test_no_network(built, tags):
    def loads_of(o):
        if 'src' in o.attrs or o.name=='link' and o['rel']!=['canonical']: yield o.get('src') or o['href']
    loads = [url for os in tags.values() for o in os for url in loads_of(o)]
    assert loads and not [u for u in loads if _outside(u)]
    assert not [f for f in (built[0]/'site'/'html').rglob('*.css')
                if re.search(r'(url\(|@import)\s*["\']?(https?:)?//', f.read_text())]

def _section(ids, anchor):
    o = ids.get(anchor)
    return o and (o if o.name=='section' else o.find_parent('section'))

def _letters(s): return re.sub(r'\W', '', s)

@pytest.mark.parametrize('mod', d['syms'])
def test_symbols_documented(built, ids, mod):
    m = import_module(mod)
    for sym in {o for n in m.__all__ if callable(o := getattr(m, n))}:
        name,home = sym.__name__,sym.__module__     # one for all its aliases; some come from another module
        path,_,anchor = d['syms'][home][f'{home}.{name}'][0].partition('#')
        sec = _section(ids[built[0]/'site'/'html'/path], anchor)
        assert sec, f'{name}: no anchor'
        assert name in sec.select_one('.highlight').text, f'{name}: no signature'
        assert sec.find('a', string='[source]'), f'{name}: no source link'
        assert _letters(getdoc(sym)) in _letters(sec.text), f'{name}: no summary'
        table = {r.td.text for r in sec.select('table tr:has(td)')}
        missing = [p for p,doc in docments(sym, args_kwargs=True).items() if doc and p!='return'
                   and not table & {p,f'*{p}',f'**{p}'}]
        assert not missing, f'{name}: not in the table: {missing}'

def test_types_are_links(pages):
    "In tables of parameters, each type that is not built into Python leads to its page, and is short"
    seen = set()
    for f,page in pages.items():
        for table in page('table'):
            head = [o.text for o in table('th')]
            if 'Type' not in head: continue
            for row in table('tr')[1:]:
                for code in row('td')[head.index('Type')]('code'):
                    seen.add(code.text)
                    assert hasattr(builtins, code.text) or code.find_parent('a'), (f.name,code.text)
    assert {'int','Path','Learner','Tensor','None'} <= seen

def test_source_links(tags, ids):
    links = [(f, o) for f,os in tags.items() for o in os if o.name=='a' and o.text=='[source]']
    assert links
    for f,a in links:
        u = urlsplit(a['href'])
        line = ids[(f.parent/u.path).resolve()][u.fragment].text
        name = a.find_parent('section').find(re.compile('h[1-6]')).text.strip('¶').rpartition('.')[2]
        assert re.search(rf'(def|class) {name}\b', line), f'{name}: {line}'
