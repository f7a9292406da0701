// A Worker for pages that are opened from disk, where browsers start none: its script runs in a hidden frame of the page.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      const load = address => new Promise((loaded, failed) => {
        const script = inside.document.createElement("script");
        script.src = address;
        script.onload = loaded;
        script.onerror = failed;
        inside.document.body.append(script);
      });
      inside.importScripts = (...addresses) => addresses.reduce((before, address) => before.then(() => load(new URL(address, url))), Promise.resolve());
      inside.postMessage = data => this.tell(this, data);
      load(url).then(() => {
        this.inside = inside;
        this.waiting.forEach(data => this.tell(inside, data));
      }, () => this.dispatchEvent(new Event("error")));
    }

    tell(listener, data) {
      const message = new MessageEvent("message", {data});
      listener.dispatchEvent(message);
      if (listener === this && this.onmessage) this.onmessage(message);
    }

    postMessage(data) {
      if (this.inside) this.tell(this.inside, data);
      else this.waiting.push(data);
    }

    terminate() {}
  };
}
