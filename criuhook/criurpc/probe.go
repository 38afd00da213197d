// SPDX-License-Identifier: Apache-2.0

package criurpc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"
)

// Version asks for CRIU's version. It is for people to read; what CRIU can do
// is to be asked by [Client.Features] and [QueriesExtFiles]. CRIU waits for
// another request afterwards.
func (c *Client) Version(ctx context.Context) (*rpc.CriuVersion, error) {
	req := &rpc.CriuReq{
		Type:     rpc.CriuReqType_VERSION.Enum(),
		KeepOpen: proto.Bool(true),
	}
	resp, err := c.Do(ctx, req, nil)
	if err != nil {
		return nil, err
	}
	if resp.GetVersion() == nil {
		return nil, &Error{Op: describe(req), Err: fmt.Errorf("%w: an answer without a version", ErrProtocol), Response: resp}
	}
	return resp.GetVersion(), nil
}

// Features asks which of the features set in want CRIU has here. A feature that
// CRIU does not know is unset in the answer. CRIU waits for another request
// afterwards.
func (c *Client) Features(ctx context.Context, want *rpc.CriuFeatures) (*rpc.CriuFeatures, error) {
	req := &rpc.CriuReq{
		Type:     rpc.CriuReqType_FEATURE_CHECK.Enum(),
		KeepOpen: proto.Bool(true),
		Features: want,
	}
	if want == nil { // CRIU would crash
		req.Features = &rpc.CriuFeatures{}
	}
	resp, err := c.Do(ctx, req, nil)
	if err != nil {
		return nil, err
	}
	if resp.GetFeatures() == nil {
		return nil, &Error{Op: describe(req), Err: fmt.Errorf("%w: an answer without features", ErrProtocol), Response: resp}
	}
	return resp.GetFeatures(), nil
}

// errProbed stops the dump of a probe where it has told enough.
var errProbed = errors.New("only a probe")

// QueriesExtFiles reports whether CRIU sends [StageQueryExtFiles]. There is no
// request to ask for that, and versions tell little about forks and backports.
// So it begins the dump of a second, idle CRIU, made for the purpose, and
// refuses it at the first notification that comes with the tree frozen.
//
// It needs the privileges of a dump. An error means that it could not be
// found out.
func QueriesExtFiles(ctx context.Context, config Config) (bool, error) {
	dir, err := os.MkdirTemp("", "criurpc-probe-")
	if err != nil {
		return false, fmt.Errorf("a folder for a probe of CRIU: %w", err)
	}
	defer os.RemoveAll(dir)
	images, err := os.Open(dir)
	if err != nil {
		return false, fmt.Errorf("a folder for a probe of CRIU: %w", err)
	}
	defer images.Close()

	config.Files = nil
	config.LogFile = ""
	victim, err := Start(config)
	if err != nil {
		return false, err
	}
	defer victim.Close()
	// Its answer tells that it is up.
	if _, err := victim.Version(ctx); err != nil {
		return false, err
	}

	var asked atomic.Bool
	_, err = Run(ctx, config, &rpc.CriuReq{
		Type: rpc.CriuReqType_DUMP.Enum(),
		Opts: &rpc.CriuOpts{
			Pid:          proto.Int32(int32(victim.PID())),
			ImagesDirFd:  proto.Int32(int32(images.Fd())),
			WorkDirFd:    proto.Int32(int32(images.Fd())),
			LogFile:      proto.String("probe.log"),
			LogLevel:     proto.Int32(4),
			LeaveRunning: proto.Bool(true),
			ShellJob:     proto.Bool(true),
		},
	}, HandlerFunc(func(_ context.Context, n *Notification) (*rpc.CriuOpts, error) {
		switch n.Stage {
		case StageQueryExtFiles:
			asked.Store(true)
			return nil, errProbed
		case StagePostDump:
			return nil, errProbed
		}
		return nil, nil
	}))
	if asked.Load() {
		return true, nil
	}
	if errors.Is(err, errProbed) {
		return false, nil // it came to the end without a question
	}
	// files.img is begun right after the place where CRIU would have asked
	// (cr_dump_tasks in criu/cr-dump.c). The dump gets little further: the victim
	// holds one end of a socketpair.
	if _, statErr := os.Stat(filepath.Join(dir, "files.img")); statErr == nil {
		return false, ctx.Err()
	}
	if err == nil {
		err = errors.New("CRIU dumped without a single notification")
	}
	return false, fmt.Errorf("find out whether CRIU asks for external files: %w", err)
}
