"The main job, in small, and its bad input"
import os, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
script = root/'examples'/'language_model.py'

def demo(*args):
    return subprocess.run([sys.executable, script, *args], cwd=root, capture_output=True, text=True, env=os.environ|{'PYTHONWARNINGS':'ignore'}, timeout=300)

def test_small_run(tmp_path):
    fig = tmp_path/'figure.png'
    res = demo('--size', 'tiny', '--epochs', '1', '--out', str(fig))
    assert res.returncode==0, res.stderr[-3000:]
    assert fig.stat().st_size>10_000 and str(fig) in res.stdout
    assert 'perplexity' in res.stdout and 'trigram' in res.stdout.lower() and 'nan' in res.stdout and 'Traceback' not in res.stderr

@pytest.mark.parametrize('content', [None, b'', b'   \n', b'\xff\xfe\x00\x01binary\x00', b'too short'], ids=['missing','empty','blank','binary','short'])
def test_bad_corpus(content, tmp_path):
    corpus = tmp_path/'corpus.txt'
    if content is not None: corpus.write_bytes(content)
    res = demo(str(corpus))
    assert res.returncode==2 and len(res.stderr.strip().splitlines())==1 and str(corpus) in res.stderr

@pytest.mark.parametrize('args', [('--epochs','0'), ('--epochs','x'), ('--size','enormous'), ('--seed','y')])
def test_bad_arguments(args):
    res = demo(*args)
    assert res.returncode==2 and args[0] in res.stderr and 'Traceback' not in res.stderr

def test_empty_folder(tmp_path):
    res = demo(str(tmp_path))
    assert res.returncode==2 and str(tmp_path) in res.stderr
