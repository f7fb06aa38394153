"""The site in a real browser: `make docs-test`, after `make docs`

Pages fit the screen of a desktop and of a phone, each callback's section shows what a user needs on its first
screen; the search finds callbacks by what people type. Needs Debian's `chromium` and the extra `browser`."""
import os, shutil, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from common import public_callbacks
from playwright.sync_api import sync_playwright
from test_guide import pages as guide, sections

root = Path(os.environ.get('SITE', Path(__file__).parent.parent/'docs'/'_build'))/'html'
pages = sorted(f.relative_to(root).as_posix() for f in root.rglob('*.html')
               if not f.is_relative_to(root/'source') and f.name not in ('search.html','genindex.html'))
where = {o: f'guide/{page}.html#{o.lower()}' for page,cells in guide.items() for o in sections(cells)}

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='session')
def site():
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()

@pytest.fixture(scope='session')
def browser():
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        yield browser
        browser.close()

def page_of(browser, width, height):
    page = browser.new_page(viewport=dict(width=width, height=height))
    page.set_default_timeout(10_000)
    return page

@pytest.fixture(scope='session')
def desktop(browser): return page_of(browser, 1280, 900)

@pytest.fixture(scope='session')
def phone(browser): return page_of(browser, 390, 844)

# what is wider than its place and can be seen: a closed fold cannot
too_wide = """what => [...document.querySelectorAll(what)].filter(o => o.checkVisibility() && o.offsetParent)
    .filter(o => o.scrollWidth>o.clientWidth+1).map(o => o.innerText.slice(0, 150))"""
fits = 'document.documentElement.scrollWidth<=innerWidth'

@pytest.mark.parametrize('page', pages)
def test_fits_a_desktop(page, site, desktop):
    desktop.goto(f'{site}/{page}')
    assert desktop.evaluate(fits)
    assert desktop.evaluate(too_wide, '.highlight pre, .table-wrapper')==[]

@pytest.mark.parametrize('page', pages)
def test_fits_a_phone(page, site, phone):
    "Code may be wider"
    phone.goto(f'{site}/{page}')
    assert phone.evaluate(fits)
    assert phone.evaluate(too_wide, '.table-wrapper, p, li')==[]

@pytest.mark.parametrize('name', [cls.__name__ for cls in public_callbacks()])
def test_first_screen(name, site, desktop):
    "From the heading of a section to its table of arguments"
    desktop.goto(f'{site}/{where[name]}')
    height = desktop.evaluate("""id => {
        const section = document.getElementById(id).closest('section')
        const top = o => o.getBoundingClientRect().top
        const source = [...section.querySelectorAll('a')].find(o => o.innerText=='[source]')
        return top(section.querySelector('table.docutils') ?? source)-top(section) }""", name.lower())
    assert 0<height<900

# what people type, and the page of the guide that answers; the page of symptoms always does
PHRASES = {
    'loss spike':'safety', 'nan':'safety', 'early stopping':'stopping', 'resume':'checkpoint',
    'exponential moving average':'averaging', 'gradient clipping':'gradients', 'out of memory':'accumulation',
    'stochastic weight averaging':'averaging', 'best model':'best', 'spot instance':'recipes',
    'time limit':'stopping', 'gradient accumulation':'accumulation', 'sharpness':'gradients',
    'lookahead':'gradients', 'hidden state':'rnn', 'preemption':'checkpoint', 'deadline':'stopping',
    'slow loop':'loop', 'order of callbacks':'tools', 'model soup':'best'}

@pytest.mark.parametrize('phrase', PHRASES)
def test_search(phrase, site, desktop):
    desktop.goto(f'{site}/search.html?q={phrase.replace(" ", "+")}')
    first = desktop.locator('ul.search li a').first
    first.wait_for(timeout=5000)
    assert first.get_attribute('href').split('.')[0] in (f'guide/{PHRASES[phrase]}','guide/choose')

def test_contents_are_in_sight(site, desktop):
    "Those of the page, beside it"
    desktop.goto(f'{site}/guide/stopping.html')
    box = desktop.locator('.toc-tree').bounding_box()
    assert box['x']+box['width']<=1280
