"The main job, in small, and its bad input"
import runpy, sys
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from common import into_file

root = Path(__file__).parent.parent
script = root/'examples'/'language_model.py'

def as_script(*args):
    sys.path.insert(0, str(script.parent))      # as Python does
    sys.argv = [str(script), *args]
    runpy.run_path(str(script), run_name='__main__')

def test_small_run(tmp_path):
    "As a process of its own"
    fig,corpus = tmp_path/'figure.png',tmp_path/'corpus'
    corpus.write_text(' '.join(topics[k] for k in sorted(topics)[:25]))
    args = [corpus, '--size', 'tiny', '--epochs', '1', '--out', fig]
    code,said = into_file(partial(as_script, *map(str, args)), tmp_path/'said')
    assert code==0, said[-3000:]
    assert fig.stat().st_size>10_000 and str(fig) in said
    assert all(o in said.lower() for o in ('perplexity','trigram','nan'))
    assert 'Traceback' not in said

@pytest.fixture(scope='module')
def main(): return runpy.run_path(script)['main']

@pytest.fixture
def refused(main, monkeypatch, capsys, tmp_path):
    "What the script says about arguments that it refuses"
    def f(*args):
        monkeypatch.setattr(sys, 'argv', ['language_model.py', *args, '--out', str(tmp_path/'figure.png')])
        with pytest.raises(SystemExit) as e: main()
        assert e.value.code==2
        return capsys.readouterr().err
    return f

bad = dict(missing=None, empty=b'', blank=b'   \n', binary=b'\xff\xfe\x00\x01binary\x00', short=b'too short')

@pytest.mark.parametrize('content', bad.values(), ids=bad)
def test_bad_corpus(content, tmp_path, refused):
    corpus = tmp_path/'corpus.txt'
    if content is not None: corpus.write_bytes(content)
    said = refused(str(corpus))
    assert len(said.strip().splitlines())==1 and str(corpus) in said

@pytest.mark.parametrize('args', [('--epochs','0'), ('--epochs','x'), ('--size','enormous'), ('--seed','y')])
def test_bad_arguments(args, refused): assert args[0] in refused(*args)

def test_empty_folder(tmp_path, refused):
    (folder := tmp_path/'empty').mkdir()
    assert str(folder) in refused(str(folder))
