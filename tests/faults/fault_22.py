import sys, threading, matplotlib as mpl; from minillm.course.figures import style  # its docstring: "no global state … safe in threads"
@style.SHEET  # as every figure of the product
def figure(begun, go): begun.set(); go.wait()
before, events = dict(mpl.rcParams), [threading.Event() for _ in range(4)]
a, b = (threading.Thread(target=figure, args=pair) for pair in (events[:2], events[2:]))
a.start(); events[0].wait(); b.start(); events[2].wait()  # both draw
events[1].set(); a.join(); events[3].set(); b.join()
changed = [k for k in before if before[k] != mpl.rcParams[k]]
print("rcParams changed for good by two figures drawn at once:", len(changed), changed[:3]); sys.exit(bool(changed))
