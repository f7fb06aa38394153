"`report` and `WriteReport`: what is on the page, whatever a log contains, and however a fit ends"
import base64, json, random, re, subprocess, sys
from html.parser import HTMLParser

import pytest
from fastai.callback.core import Callback
from fastcore.xtras import working_directory
from common import fit
from fastai_callbacks_ext import report as module
from fastai_callbacks_ext.all import WriteReport, RunLog, SkipNonFinite, Throughput, read_log, report
from fastai_callbacks_ext.base.rows import RowFile
from fastai_callbacks_ext.report import main
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_learner

EVIL = '<script>alert(1)</script> "\'&$x_{1}$'
PNG = base64.b64encode(b'\x89PNG').decode()

def rows(n=40, evil='plain', items=50):
    "A log with rows of every kind, in which all names are `evil`"
    r = random.Random(0)
    yield dict(kind='start', t=0, fit=0, step=0, host=evil, command=[evil], commit='abc', device=evil)
    checks = [dict(name=evil, status='look', what=evil, why=evil)]
    yield dict(kind='preflight', t=0, fit=0, step=0, checks=checks)
    for f in range(2):
        yield dict(kind='fit', t=f, fit=f, step=f*n, n_epoch=1, facts={'model': {evil: evil}, 'rate': f})
        for i in range(f*n, f*n+n):
            at = dict(t=i, fit=f, step=i, epoch=0, batch=i-f*n)
            loss = r.random() if i%7 else 'nan'
            yield dict(kind='step', loss=loss, smooth_loss=r.random(), lr=.1/(i+1)) | at
            if i%10: continue
            yield dict(kind='throughput', steps=10, items_per_s=100*r.random(), step_ms=6., memory_MB=50+i,
                       validation_s=1., worker_start_s=0.) | {f'{p}_ms': 1. for p in module._parts} | at
            norms = dict(weight_norm=[1.,2.], grad_norm=[.1,.2], update_norm=[.1,.2], update_ratio=[.1,0.])
            norms |= dict(names=[evil,'b'], grad_norm_total=r.random(), noise_scale=None)
            yield dict(kind='layers') | norms | at
            yield dict(kind='activations', names=[evil,'b'], mean=[0.,1.], std=[1.,1.], near_zero=[.1,.2],
                       dead_units=[i%4,None], units=[4,0]) | at
        at = dict(t=f*n+n, fit=f, step=f*n+n, epoch=0)
        metrics = {'train_loss': .5, 'valid_loss': .5-f/10, evil: f+.5, 'accuracy': .7}
        yield dict(kind='epoch', metrics=metrics) | at
        yield dict(kind='event', callback=evil, what=evil, why=evil, iteration=1) | at
        yield dict(kind='verdict', what=evil, why=evil, next=evil) | at
        worst = [dict(index=i, label=evil, predicted=evil, confidence=.1, image=o, text=evil)
                 for i,o in enumerate((PNG, evil, None, '" onerror="alert(1)'))]
        numbers = {k: [r.random() for _ in range(items)] for k in ('confidence','variability','margin')}
        yield dict(kind='items', index=list(range(items)), forgetting=[1]*items, worst=worst) | numbers | at
        yield dict(kind='end', status='finished') | at

def log(path, **kwargs):
    RowFile(path).add(*rows(**kwargs))
    return path

@pytest.fixture
def no_figures(monkeypatch):
    "Figures take a second"
    monkeypatch.setattr(module, '_figure', lambda draw,*args,about,**kwargs: about)

class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags,self.attrs,self.texts = [],[],[]
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += attrs
    def handle_data(self, data): self.texts.append(data)

def test_everything_is_on_the_page_as_text(tmp_path):
    page = report(log(tmp_path/'a.jsonl', evil=EVIL), compare=log(tmp_path/'b.jsonl', n=20)).read_text()
    found = Elements(page)
    titles = re.findall('<h2>(.*?)</h2>', page)
    assert titles==list(module._sections) and 'not shown' not in page
    assert 'script' not in found.tags and not any(k.startswith('on') for k,_ in found.attrs)
    assert sum(EVIL in t for t in found.texts)>10
    sources = [v for k,v in found.attrs if k in ('src','href')]
    assert all(re.fullmatch('data:image/(png|svg[+]xml);base64,[A-Za-z0-9+/=]+', o) for o in sources)
    assert sources.count(f'data:image/png;base64,{PNG}')==1     # the other images are no base64
    assert "default-src 'none'" in dict(found.attrs).get('content', '') or "default-src 'none'" in page

def test_what_comes_first(no_figures, tmp_path):
    page = report(log(tmp_path/'a.jsonl')).read_text()
    first = re.findall('<li>(.*?)</li>', page)
    assert first==['The run has finished, after 2 epochs', 'plain: plain; plain',
                   'Callbacks reported: plain (2)', 'Preflight: plain']
    RowFile(tmp_path/'a.jsonl').add(
        dict(kind='rewind', t=90, fit=1, step=80, epoch_open=True),
        dict(kind='throughput', t=91, fit=1, step=80, left_s=61., **{f'{p}_ms': 1. for p in module._parts}),
        dict(kind='epoch', t=92, fit=1, step=80, epoch=0, weights='ema', metrics=dict(valid_loss=.4)))
    assert re.findall('<li>(.*?)</li>', report(tmp_path/'a.jsonl').read_text())[:3]==[
        'The run goes on, or was killed, after 2 epochs', 'Time left when it wrote last: 01:01',
        'Metrics are those of averaged weights: ema']
    best = re.search('Best and last.*?</table>', page, re.S)[0]
    cells = re.findall('<td>(.*?)</td>', best)
    assert cells[4:8]==['valid_loss','0.4','epoch 0 of fit 1','0.4']        # the smaller one
    assert cells[8:12]==['plain','?','','1.5'] and cells[12:]==['accuracy','0.7','epoch 0 of fit 0','0.7']

def test_differences_to_another_run(no_figures, tmp_path):
    page = report(log(tmp_path/'a.jsonl'), compare=log(tmp_path/'b.jsonl', evil='other')).read_text()
    differs = re.search('differs.*?</table>', page, re.S)[0]
    assert re.findall('<td>(.*?)</td>', differs)[:3]==['host','plain','other']
    page = report(tmp_path/'a.jsonl', compare=tmp_path/'a.jsonl', path=tmp_path/'same.html').read_text()
    assert 'No difference.' in page

def test_a_long_run_is_a_small_file(tmp_path):
    path = report(log(tmp_path/'a.jsonl', n=3000, items=5000))
    assert path.stat().st_size<3*2**20

def test_a_log_with_anything_in_it(no_figures, tmp_path):
    "Rows that lack names, or have others: the rest is shown"
    r = random.Random(0)
    for i in range(8):
        file = RowFile(tmp_path/f'{i}.jsonl')
        for row in rows(n=10, items=5):
            lost = r.choice([k for k in row if k not in ('kind','t','fit','step','status')] or ['kind'])
            file.add({k: v for k,v in row.items() if k!=lost or lost=='kind'})
        page = report(tmp_path/f'{i}.jsonl').read_text()
        assert 'Configuration' in page
    RowFile(tmp_path/'none.jsonl').add(dict(kind='start', t=0, fit=0, step=0))
    assert 'The run goes on, or was killed, after 0 epochs' in report(tmp_path/'none.jsonl').read_text()

class Fails(Callback):
    "Raises an error in mid-fit"
    def __init__(self, error): self.error = error
    def after_batch(self):
        if self.training and self.train_iter==2: raise self.error

@pytest.mark.parametrize('error,said', [
    (None, 'The run has finished, after 1 epoch'),
    (KeyboardInterrupt(), 'The run was interrupted, after 0 epochs'),
    (ValueError('<b>bad</b>'), 'bad&lt;/b')])
def test_a_report_at_the_end_of_each_fit(no_figures, tmp_path, capsys, error, said):
    learn = digits_learner([RunLog(tmp_path, every=1), WriteReport(), Throughput(skip=0)], n=160, bs=32)
    try: fit(learn, cbs=Fails(error) if error else None)
    except (KeyboardInterrupt,ValueError): pass
    path, = tmp_path.glob('*.html')
    assert said in path.read_text() and f'write_report: {path}' in capsys.readouterr().out
    fit(learn)
    assert len(list(tmp_path.glob('*.html')))==1

class Asks(Callback):
    "Asks for a report in mid-run"
    order = 3000
    def after_epoch(self):
        if self.epoch==0: self.page = report(self.learn).read_text()

def test_a_report_in_mid_run(no_figures, tmp_path):
    cbs = [RunLog(tmp_path, every=1), asks := Asks(), PoisonBatch(2), SkipNonFinite()]
    fit(digits_learner(cbs, n=160, bs=32), 2)
    assert 'The run goes on, or was killed, after 1 epoch' in asks.page and 'skip_non_finite' in asks.page

def test_a_report_that_fails_is_said_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'to_xml', lambda *args,**kwargs: 1/0)
    learn = digits_learner([RunLog(tmp_path), rep := WriteReport()], n=160, bs=32)
    fit(learn, 2)
    assert [r.what for r in rep.records]==['writes no report'] and len(learn.recorder.values)==2

def test_a_section_that_fails_does_not_hide_the_others(no_figures, tmp_path, monkeypatch):
    monkeypatch.setitem(module._sections, 'Losses', lambda run,other: 1/0)
    page = report(log(tmp_path/'a.jsonl')).read_text()
    assert 'not shown: ZeroDivisionError' in page and 'Configuration' in page

def test_what_is_refused(tmp_path):
    learn = digits_learner(n=160, bs=32)
    with pytest.raises(ValueError, match='no RunLog is on the learner'): report(learn)
    with pytest.raises(ValueError, match='has written nothing yet'): report(learn.add_cb(RunLog(tmp_path)))
    with pytest.raises(ValueError, match="compare='nowhere'"): fit(learn, cbs=WriteReport('nowhere'))
    with pytest.raises(TypeError, match='compare=3'): WriteReport(compare=3)
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='no file'): report(tmp_path/'empty')

def test_without_a_log_there_is_no_report():
    fit(digits_learner([rep := WriteReport()], n=160, bs=32))
    assert [str(r) for r in rep.records]==['write_report: writes no report in epoch 0: no RunLog is on the '
                                           'learner; add RunLog()']

def test_the_command(no_figures, tmp_path, capsys):
    log(tmp_path/'runs'/'a.jsonl')
    with working_directory(tmp_path): main([])
    assert capsys.readouterr().out.strip().endswith('a.html')
    with pytest.raises(SystemExit) as e: main([str(tmp_path)])
    assert e.value.code==1 and 'no file' in capsys.readouterr().err
