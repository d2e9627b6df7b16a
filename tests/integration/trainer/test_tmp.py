import time
from in_process import rl_here
from runs import rl_overrides
def test_a(work,data,start,sft_run):
    print([ (r['step'],r.get('val/parse_failure'),r.get('val/accuracy')) for r in sft_run.rows if 'val/accuracy' in r])
    t=time.time()
    r=rl_here(rl_overrides(data,start,work/'a'),work/'a')
    print(time.time()-t); print(r.code,r.out,r.err)
    r.ok()
    print(r.rows)
